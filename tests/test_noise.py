"""Noise models against SciPy's distributions, integrals and simulated magnitudes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.special import i0e, i1e

from qmri import Gaussian, Rician
from qmri.noise import (
    ComplexGaussian,
    rician_bias,
    sigma_from_background,
    sigma_from_repeats,
    sigma_from_residuals,
    sigma_from_variances,
)

SNRS = np.array([0.0, 0.01, 0.3, 1.0, 2.0, 5.0, 15.0, 30.0, 100.0])


class TestGaussian:
    def test_nll_is_scipys(self):
        clean = np.linspace(-2, 5, 8)[np.newaxis]
        measured = clean + np.linspace(-3, 3, 8)
        expected = -stats.norm(clean, 0.7).logpdf(measured)
        np.testing.assert_allclose(Gaussian(0.7).nll(measured, clean), expected, rtol=1e-13)

    def test_information_is_one_over_variance(self):
        np.testing.assert_allclose(Gaussian(0.25).fisher_information(np.ones((3, 4))), 16.0)

    def test_samples(self):
        clean = np.full((1, 100_000), 3.0)
        noisy = Gaussian(0.5).sample(clean, np.random.default_rng(0))
        assert stats.kstest(noisy[0], stats.norm(3.0, 0.5).cdf).pvalue > 1e-3


class TestRician:
    @pytest.mark.parametrize("snr", SNRS)
    def test_nll_is_scipys(self, snr):
        sigma = 0.2
        measured = sigma * np.maximum(snr + np.linspace(-5, 5, 21), 0.05)[np.newaxis]
        clean = np.full_like(measured, snr * sigma)
        expected = -stats.rice(snr, scale=sigma).logpdf(measured)
        np.testing.assert_allclose(Rician(sigma).nll(measured, clean), expected, rtol=1e-10)

    @pytest.mark.parametrize("snr", SNRS)
    def test_density_integrates_to_one(self, snr):
        noise = Rician(0.2)

        def density(m):
            return np.exp(-noise.nll(np.array([[m]]), np.array([[snr * 0.2]])))[0, 0]

        low, high = max(0, snr - 10) * 0.2, (snr + 10) * 0.2
        total, _ = integrate.quad(density, low, high, epsabs=1e-12)
        assert total == pytest.approx(1.0, abs=1e-9)

    def test_far_above_noise_it_is_gaussian(self):
        # At SNR 1000, Rice(s) is N(sqrt(s^2 + sigma^2), sigma) to order 1 / SNR.
        sigma, clean = 1e-3, np.ones((1, 41))
        measured = 1 + sigma * np.linspace(-5, 5, 41)[np.newaxis]
        gaussian = Gaussian(sigma).nll(measured, np.hypot(clean, sigma))
        np.testing.assert_allclose(Rician(sigma).nll(measured, clean), gaussian, atol=6e-3)

    @settings(max_examples=200, deadline=None)
    @given(
        measured=st.floats(1e-6, 1e6),
        clean=st.floats(0, 1e6),
        sigma=st.floats(1e-3, 1e3),
    )
    def test_no_overflow_anywhere(self, measured, clean, sigma):
        noise = Rician(sigma)
        m, s = np.array([[measured]]), np.array([[clean]])
        assert np.isfinite(noise.nll(m, s)).all()
        assert np.isfinite(noise.nll_gradient(m, s)).all()
        assert np.isfinite(noise.fisher_information(s)).all()
        assert all(np.isfinite(term).all() for term in noise.quadratic_terms(m, s))

    @pytest.mark.parametrize("measured", [0.02, 0.5, 1.0, 3.0, 40.0])
    def test_gradient_in_both_tails(self, measured):
        # Measured far below and far above the noise-free signal, in units of sigma = 1.
        noise, clean = Rician(1.0), np.linspace(0.05, 40, 200)[np.newaxis]
        m, h = np.full_like(clean, measured), 1e-5
        difference = (noise.nll(m, clean + h) - noise.nll(m, clean - h)) / (2 * h)
        np.testing.assert_allclose(noise.nll_gradient(m, clean), difference, rtol=1e-6, atol=1e-7)

    def test_gradient_at_the_noise_floor(self):
        # log I0(z) = z^2 / 4 for small z: d nll / d s = s (1 - m^2 / 2)
        s = np.array([[1e-5]])
        for m in (0.1, 1.0, 2.0):
            gradient = Rician(1.0).nll_gradient(np.array([[m]]), s)[0, 0]
            assert gradient == pytest.approx(1e-5 * (1 - m**2 / 2), rel=1e-6)

    def test_a_signed_signal_counts_by_its_magnitude(self):
        m, s = np.array([[0.3, 1.4]]), np.array([[0.8, 1.2]])
        noise = Rician(0.5)
        np.testing.assert_allclose(noise.nll(m, -s), noise.nll(m, s), rtol=1e-14)
        np.testing.assert_allclose(noise.nll_gradient(m, -s), -noise.nll_gradient(m, s))
        np.testing.assert_allclose(noise.fisher_information(-s), noise.fisher_information(s))
        np.testing.assert_allclose(
            noise.quadratic_terms(m, -s).gradient, -noise.quadratic_terms(m, s).gradient
        )

    def test_impossible_magnitudes(self):
        measured = np.array([[-0.1, 0.0, np.nan, np.inf, 0.4]])
        nll = Rician(0.5).nll(measured, np.ones((1, 5)))[0]
        assert np.isinf(nll[0]) and np.isinf(nll[1]) and np.isnan(nll[2]) and np.isfinite(nll[4])
        np.testing.assert_array_equal(
            Rician(0.5).possible(measured), [[False, True, False, False, True]]
        )

    @pytest.mark.parametrize("snr", [0.0, 1.0, 5.0, 30.0])
    def test_samples(self, snr):
        clean = np.full((1, 50_000), snr * 0.2)
        noisy = Rician(0.2).sample(clean, np.random.default_rng(int(snr)))
        assert stats.kstest(noisy[0], stats.rice(snr, scale=0.2).cdf).pvalue > 1e-3

    def test_same_seed_same_noise(self):
        clean = np.ones((2, 3))
        first, second = (Rician(0.1).sample(clean, np.random.default_rng(3)) for _ in range(2))
        np.testing.assert_array_equal(first, second)


class TestComplexGaussian:
    clean = np.array([[3 - 4j, 0.0, 1e-3j]])

    def test_each_channel_is_normal_with_sd_sigma(self):
        noisy = ComplexGaussian(0.5).sample(np.full((1, 100_000), 3 - 2j), np.random.default_rng(0))
        for channel, mean in ((noisy.real, 3.0), (noisy.imag, -2.0)):
            assert stats.kstest(channel[0], stats.norm(mean, 0.5).cdf).pvalue > 1e-3
        # A correlation of n independent pairs is known to 1 / sqrt(n).
        assert abs(np.corrcoef(noisy.real[0], noisy.imag[0])[0, 1]) < 4 / np.sqrt(100_000)

    def test_magnitude_is_rician(self):
        noise, clean = ComplexGaussian(0.2), np.full((1, 50_000), 0.3 + 0.4j)
        magnitude = np.abs(noise.sample(clean, np.random.default_rng(1)))[0]
        assert stats.kstest(magnitude, stats.rice(2.5, scale=0.2).cdf).pvalue > 1e-3

    def test_nll_is_that_of_two_real_channels(self):
        measured = self.clean + np.array([[0.3 + 0.1j, -2j, 0.7]])
        both = sum(
            Gaussian(0.7).nll(getattr(measured, part), getattr(self.clean, part))
            for part in ("real", "imag")
        )
        np.testing.assert_allclose(ComplexGaussian(0.7).nll(measured, self.clean), both, rtol=1e-13)

    def test_gradient_by_both_channels(self):
        noise, h = ComplexGaussian(0.7), 1e-6
        measured = self.clean + np.array([[0.3 + 0.1j, -2j, 0.7]])
        real, imaginary = (
            (noise.nll(measured, self.clean + step) - noise.nll(measured, self.clean - step))
            / (2 * h)
            for step in (h, 1j * h)
        )
        gradient = noise.nll_gradient(measured, self.clean)
        np.testing.assert_allclose(gradient, real + 1j * imaginary, atol=1e-8)
        terms = noise.quadratic_terms(measured, self.clean)
        np.testing.assert_allclose(terms.gradient, gradient, rtol=1e-13)
        np.testing.assert_allclose(terms.curvature, 1 / 0.7**2)

    def test_information_of_a_channel_is_one_over_variance(self):
        information = ComplexGaussian(0.25).fisher_information(self.clean)
        assert information.dtype == np.float64
        np.testing.assert_allclose(information, 16.0)

    def test_impossible_measurements(self):
        measured = np.array([[1j, np.nan, complex(0, np.inf), -1.0]])
        np.testing.assert_array_equal(
            ComplexGaussian(0.5).possible(measured), [[True, False, False, True]]
        )

    def test_same_seed_same_noise(self):
        first, second = (
            ComplexGaussian(0.1).sample(self.clean, np.random.default_rng(3)) for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)


class TestRicianInformation:
    @pytest.mark.parametrize("snr", np.geomspace(1e-3, 300, 25))
    def test_against_an_adaptive_integral(self, snr):
        """The variance of the score, integrated with another rule over another form."""

        def integrand(m):
            density = m * np.exp(-((m - snr) ** 2) / 2) * i0e(snr * m)
            return density * (m * i1e(snr * m) / i0e(snr * m) - snr) ** 2

        points = [max(0.0, snr - 14), snr, snr + 14]
        exact = sum(
            integrate.quad(integrand, a, b, epsabs=0, epsrel=1e-11, limit=200)[0]
            for a, b in pairwise(points)
        )
        information = Rician(1.0).fisher_information(np.array([[snr]]))[0, 0]
        assert information == pytest.approx(exact, rel=1e-8)

    def test_without_signal_it_vanishes_as_the_square(self):
        snr = np.array([[0.0, 1e-150, 1e-8, 1e-4, 1e-2]])
        information = Rician(1.0).fisher_information(snr)
        assert information[0, 0] == 0
        np.testing.assert_allclose(information[0, 1:], snr[0, 1:] ** 2, rtol=2e-4)

    def test_far_above_noise_it_is_gaussian(self):
        snr = np.array([[20.0, 100.0, 1e4, 1e8, 1e150]])
        information = Rician(1.0).fisher_information(snr)
        # 1 - 1 / (2 SNR^2) is the next term of the expansion.
        np.testing.assert_allclose(information, 1 - 0.5 / snr**2, rtol=1e-5)

    def test_never_more_than_gaussian_and_growing_with_signal(self):
        snr = np.geomspace(1e-3, 1e3, 2000)[np.newaxis]
        information = Rician(1.0).fisher_information(snr)
        assert np.all(information <= 1) and np.all(np.diff(information) > 0)

    def test_is_the_variance_of_the_score(self):
        clean = np.full((1, 400_000), 1.3)
        noise = Rician(0.8)
        score = noise.nll_gradient(noise.sample(clean, np.random.default_rng(5)), clean)
        # The score's kurtosis is below 4: its variance is known to sqrt(3 / n).
        expected = noise.fisher_information(clean)[0, 0]
        assert np.var(score) == pytest.approx(expected, rel=4 * np.sqrt(3 / score.size))
        assert abs(np.mean(score)) < 4 * np.sqrt(expected / score.size)


@pytest.mark.parametrize("noise", [Gaussian(0.3), Rician(0.3)])
class TestQuadraticTerms:
    def pairs(self):
        rng = np.random.default_rng(11)
        clean = rng.uniform(-1, 6, size=(200, 7))
        return np.abs(clean + 0.6 * rng.standard_normal(clean.shape)), clean

    def test_value_is_nll_up_to_a_constant_of_the_data(self, noise):
        measured, clean = self.pairs()
        _, other = self.pairs()
        other = other[::-1].copy()
        value = noise.quadratic_terms(measured, clean).value
        change = value - noise.quadratic_terms(measured, other).value
        expected = noise.nll(measured, clean) - noise.nll(measured, other)
        np.testing.assert_allclose(change, expected, rtol=1e-9, atol=1e-9)

    def test_gradient_is_exact(self, noise):
        measured, clean = self.pairs()
        np.testing.assert_allclose(
            noise.quadratic_terms(measured, clean).gradient,
            noise.nll_gradient(measured, clean),
            rtol=1e-8,
            atol=1e-8,
        )

    def test_curvature_is_the_information_within_ten_per_cent(self, noise):
        measured, clean = self.pairs()
        ratio = noise.quadratic_terms(measured, clean).curvature / noise.fisher_information(clean)
        assert np.all((ratio > 0.9) & (ratio < 1.1))


@pytest.mark.parametrize("kind", [ComplexGaussian, Gaussian, Rician])
class TestSigma:
    @pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf, [], [0.1, -0.1]])
    def test_bad_sigma_is_refused(self, kind, sigma):
        with pytest.raises(ValueError, match="sigma must hold positive, finite"):
            kind(sigma)

    def test_too_many_axes_are_refused(self, kind):
        with pytest.raises(ValueError, match="sigma must broadcast"):
            kind(np.ones((2, 2, 2)))

    def test_one_sigma_per_voxel_is_each_voxel_alone(self, kind):
        clean = np.random.default_rng(1).uniform(0.5, 2, size=(3, 4))
        measured, sigmas = clean * 1.1, np.array([[0.1], [0.2], [0.4]])
        together = kind(sigmas)
        for v, sigma in enumerate(sigmas[:, 0]):
            alone = kind(float(sigma))
            row = slice(v, v + 1)
            for name in ("nll", "nll_gradient"):
                np.testing.assert_allclose(
                    getattr(together, name)(measured, clean)[row],
                    getattr(alone, name)(measured[row], clean[row]),
                )
            np.testing.assert_allclose(
                together.at(row).quadratic_terms(measured[row], clean[row]).value,
                alone.quadratic_terms(measured[row], clean[row]).value,
            )

    def test_one_sigma_per_measurement(self, kind):
        clean = np.ones((2, 3))
        information = kind([[0.1, 0.1, 0.05]]).fisher_information(clean)
        assert information[0, 2] == pytest.approx(4 * information[0, 0], rel=0.02)


class TestRicianBias:
    @pytest.mark.parametrize("snr", SNRS[SNRS < 30])
    def test_is_the_mean_minus_the_signal(self, snr):
        expected = stats.rice(snr, scale=0.5).mean() - snr * 0.5
        assert rician_bias(snr * 0.5, 0.5) == pytest.approx(expected, rel=1e-6, abs=1e-9)

    def test_far_above_noise(self):
        assert rician_bias(100.0, 0.5) == pytest.approx(0.5**2 / 200, rel=1e-4)

    def test_floor_without_signal(self):
        assert rician_bias(0.0, 2.0) == pytest.approx(2.0 * np.sqrt(np.pi / 2), rel=1e-14)


class TestEstimatingSigma:
    rng = np.random.default_rng(21)

    def test_repeats_at_high_snr(self):
        clean = np.broadcast_to(self.rng.uniform(20, 60, size=(2000, 1)), (2000, 12))
        sigma = sigma_from_repeats(Rician(1.0).sample(clean, self.rng))
        # sd of a pooled variance: sqrt(2 / degrees of freedom)
        assert sigma == pytest.approx(1.0, abs=4 * np.sqrt(0.5 / (2000 * 11)))

    @pytest.mark.parametrize(("snr", "expected"), [(0.0, 0.655), (5.0, 0.99)])
    def test_repeats_are_too_small_near_the_floor(self, snr, expected):
        sigma = sigma_from_repeats(Rician(1.0).sample(np.full((4000, 12), snr), self.rng))
        assert sigma == pytest.approx(stats.rice(snr).std(), abs=0.012)
        assert sigma == pytest.approx(expected, abs=0.015)

    def test_background_of_pure_noise(self):
        sigma = sigma_from_background(Rician(3.0).sample(np.zeros((100, 1000)), self.rng))
        # m^2 is exponential: the mean of n of them is known to 1 / sqrt(n).
        assert sigma == pytest.approx(3.0, rel=4 * 0.5 / np.sqrt(100_000))

    def test_background_with_signal_is_too_large(self):
        assert sigma_from_background(Rician(1.0).sample(np.ones((1, 50_000)), self.rng)) > 1.15

    def test_residuals_count_degrees_of_freedom(self):
        x = np.linspace(0, 1, 6)
        design = np.stack([np.ones(6), x], axis=1)
        clean = self.rng.uniform(1, 2, size=(4000, 2)) @ design.T
        measured = Gaussian(0.3).sample(clean, self.rng)
        fitted = measured @ np.linalg.pinv(design).T @ design.T
        sigma = sigma_from_residuals(measured, fitted, n_parameters=2)
        assert sigma == pytest.approx(0.3, rel=4 * np.sqrt(0.5 / (4000 * 4)))

    @pytest.mark.parametrize("repeats", [2, 6, 24])
    def test_variances_give_the_typical_voxel(self, repeats):
        """However few the degrees of freedom, and whatever a hundredth of the voxels does."""
        values = Gaussian(2.0).sample(np.zeros((40_000, repeats)), self.rng)
        sigma = sigma_from_variances(values.var(axis=1, ddof=1), repeats - 1)
        assert sigma == pytest.approx(2.0, rel=0.02)
        values[:400] *= 50
        moved = sigma_from_variances(values.var(axis=1, ddof=1), repeats - 1)
        assert moved == pytest.approx(sigma, rel=0.03)
        assert sigma_from_repeats(values) > 2 * moved

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match=r"variances must have shape \(voxels,\), one or more"):
            sigma_from_variances([], 3)
        with pytest.raises(ValueError, match="variances must be finite and not negative"):
            sigma_from_variances([1.0, -1.0], 3)
        with pytest.raises(ValueError, match="degrees_of_freedom must be 1 or more, got 0"):
            sigma_from_variances([1.0], 0)
        with pytest.raises(ValueError, match="at least 2 repeats"):
            sigma_from_repeats(np.ones((5, 1)))
        with pytest.raises(ValueError, match=r"repeats must have shape \(voxels, repeats\)"):
            sigma_from_repeats(np.ones(5))
        with pytest.raises(ValueError, match="repeats must be finite, got 1 voxels"):
            sigma_from_repeats([[1.0, np.nan], [1.0, 2.0]])
        with pytest.raises(ValueError, match="magnitudes must hold at least one"):
            sigma_from_background([])
        with pytest.raises(ValueError, match="2 of 3 are zero.*blanked"):
            sigma_from_background([0.0, 0.0, 1.0])
        with pytest.raises(ValueError, match="magnitudes must be finite"):
            sigma_from_background([1.0, np.inf])
        with pytest.raises(ValueError, match="fitted must have the shape of measured"):
            sigma_from_residuals(np.ones((2, 3)), np.ones((2, 4)), 1)
        with pytest.raises(ValueError, match="n_parameters must be from 0 to 2"):
            sigma_from_residuals(np.ones((2, 3)), np.ones((2, 3)), 3)
