"""The Cramer-Rao bound: textbook cases, singular ones, and the spread of real estimates."""

from __future__ import annotations

import numpy as np
import pytest

from qmri import (
    IVIM,
    FunctionModel,
    Gaussian,
    Parameter,
    Rician,
    cramer_rao_bound,
    fisher_information,
    fit_mle,
)
from qmri.crb import bound_from_jacobian, bound_with_complex_parameters, with_amplitude
from qmri.models import SignalModel
from qmri.noise import ComplexGaussian

PAPER_BVALUES = (0, 10, 20, 30, 50, 80, 100, 200, 400, 800)
MODEL = IVIM(PAPER_BVALUES)


def parameter(name):
    return Parameter(name, name, "1", (0.5, 1.5), (-10, 10))


def line(x):
    return FunctionModel(lambda t, a, b: a + b * t, x, [parameter("a"), parameter("b")])


class TestTextbook:
    def test_mean_of_repeats(self):
        model = FunctionModel(lambda t, a: a + 0 * t, np.zeros(25), [parameter("a")])
        bound = cramer_rao_bound(model, Gaussian(2.0), [[1.0]])
        assert bound[0, 0] == pytest.approx(4.0 / 25, rel=1e-8)

    def test_straight_line_is_ordinary_least_squares(self):
        x = np.array([0.0, 1.0, 2.0, 5.0])
        design = np.stack([np.ones(4), x], axis=1)
        expected = 0.3**2 * np.diag(np.linalg.inv(design.T @ design))
        bound = cramer_rao_bound(line(x), Gaussian(0.3), [[1.0, 0.7]])
        np.testing.assert_allclose(bound[0], expected, rtol=1e-7)

    def test_information_matrix_of_the_line(self):
        x = np.array([0.0, 1.0, 2.0, 5.0])
        information = fisher_information(line(x), Gaussian(0.5), [[1.0, 0.7]])[0]
        np.testing.assert_allclose(
            information, 4 * np.array([[4, x.sum()], [x.sum(), np.sum(x**2)]]), rtol=1e-7
        )

    def test_bound_is_the_inverse_of_the_information(self):
        theta = MODEL.sample(50, np.random.default_rng(1))
        noise = Rician(1 / 20)
        inverse = np.linalg.inv(fisher_information(MODEL, noise, theta))
        diagonal = np.diagonal(inverse, axis1=1, axis2=2)
        np.testing.assert_allclose(cramer_rao_bound(MODEL, noise, theta), diagonal, rtol=1e-6)

    def test_ten_times_the_noise_a_hundred_times_the_variance(self):
        theta = MODEL.sample(20, np.random.default_rng(2))
        ratio = cramer_rao_bound(MODEL, Gaussian(0.5), theta) / cramer_rao_bound(
            MODEL, Gaussian(0.05), theta
        )
        np.testing.assert_allclose(ratio, 100, rtol=1e-9)

    def test_four_repeats_quarter_the_variance(self):
        theta = MODEL.sample(20, np.random.default_rng(3))
        four = cramer_rao_bound(IVIM(np.tile(PAPER_BVALUES, 4)), Rician(0.05), theta)
        one = cramer_rao_bound(MODEL, Rician(0.05), theta)
        np.testing.assert_allclose(four, one / 4, rtol=1e-8)


class TestNoiseModels:
    theta = MODEL.sample(200, np.random.default_rng(4))

    def test_magnitudes_never_tell_more_than_a_real_channel(self):
        rician = cramer_rao_bound(MODEL, Rician(1 / 10), self.theta)
        gaussian = cramer_rao_bound(MODEL, Gaussian(1 / 10), self.theta)
        assert np.all(rician >= gaussian)
        assert np.max(rician / gaussian) > 1.2

    def test_at_high_snr_they_agree(self):
        rician = cramer_rao_bound(MODEL, Rician(1e-3), self.theta)
        gaussian = cramer_rao_bound(MODEL, Gaussian(1e-3), self.theta)
        np.testing.assert_allclose(rician, gaussian, rtol=1e-3)


class TestUnidentifiable:
    @pytest.mark.parametrize("noise", [Gaussian(0.05), Rician(0.05)])
    def test_without_perfusion_dfast_alone_is_unknown(self, noise):
        bound = cramer_rao_bound(MODEL, noise, [[1.0, 0.0, 1.0, 50.0]])[0]
        assert np.isinf(bound[3])
        assert np.isfinite(bound[:3]).all()

    def test_a_product_leaves_both_factors_unknown(self):
        model = FunctionModel(
            lambda t, a, b, c: a * b + c * t, [0.0, 1.0, 2.0], [parameter(n) for n in "abc"]
        )
        bound = cramer_rao_bound(model, Gaussian(0.1), [[1.0, 1.2, 0.8]])[0]
        assert np.isinf(bound[:2]).all() and np.isfinite(bound[2])

    def test_fewer_measurements_than_parameters(self):
        bound = cramer_rao_bound(IVIM([0, 50, 400]), Gaussian(0.05), [[1.0, 0.3, 1.0, 50.0]])[0]
        assert np.isinf(bound[1:]).all()

    def test_b0_alone_still_tells_S0(self):
        bound = cramer_rao_bound(IVIM([0, 0]), Gaussian(0.1), [[1.0, 0.3, 1.0, 50.0]])[0]
        assert bound[0] == pytest.approx(0.1**2 / 2)
        assert np.isinf(bound[1:]).all()

    def test_it_diverges_as_perfusion_vanishes(self):
        f = np.array([0.3, 0.1, 0.03, 0.01, 1e-3])
        theta = np.stack([np.ones(5), f, np.ones(5), np.full(5, 40.0)], axis=1)
        dfast = cramer_rao_bound(MODEL, Gaussian(0.05), theta)[:, 3]
        assert np.all(np.diff(dfast) > 0)
        assert dfast[-1] / dfast[-2] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("kind", [Gaussian, Rician])
@pytest.mark.parametrize(
    "theta", [[1.0, 0.3, 1.0, 30.0], [1.0, 0.4, 2.0, 60.0], [1.1, 0.2, 0.6, 20.0]]
)
def test_maximum_likelihood_reaches_the_bound_at_high_snr(kind, theta):
    """At SNR 1000 the estimate is as good as linear in the noise."""
    repeats, sigma = 20_000, 1e-3
    truth = np.broadcast_to(theta, (repeats, 4))
    signals = kind(sigma).sample(MODEL.signal(truth), np.random.default_rng(7))
    estimates = fit_mle(MODEL, kind(sigma), signals, start=truth).theta
    bound = cramer_rao_bound(MODEL, kind(sigma), [theta])[0]
    # A sample variance of n normal values is known to sqrt(2 / n).
    np.testing.assert_allclose(estimates.var(axis=0) / bound, 1, atol=4.5 * np.sqrt(2 / repeats))
    standard_error = np.sqrt(bound / repeats)
    curvature = 0.02 * np.sqrt(bound)  # what is left of the second order at this SNR
    assert np.all(np.abs(estimates.mean(axis=0) - theta) < 4 * standard_error + curvature)


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        (np.ones((2, 3)), r"theta must have shape \(voxels, 4\).*got \(2, 3\)"),
        (np.ones(4), r"got \(4,\)"),
        ([[1, 0.3, np.nan, 50]], "theta must be finite, got 1 voxels.*first is voxel 0"),
    ],
)
def test_bad_theta_is_named(theta, message):
    with pytest.raises(ValueError, match=message):
        cramer_rao_bound(MODEL, Gaussian(0.1), theta)
    with pytest.raises(ValueError, match=message):
        fisher_information(MODEL, Gaussian(0.1), theta)


# Complex signals.


class Oscillation(SignalModel):
    """exp((-rate + 1j frequency) t): a free induction decay, with its exact derivatives."""

    def __init__(self, times):
        self.times = np.asarray(times, dtype=float)
        self.measurements = len(self.times)
        self.parameters = (
            Parameter("rate", "R_2", "1/s", (0.5, 3.0), (0.0, 100.0)),
            Parameter("frequency", r"\omega", "rad/s", (-5.0, 5.0), (-50.0, 50.0)),
        )

    def signal(self, theta):
        theta = self.check_theta(theta)
        return np.exp((-theta[:, :1] + 1j * theta[:, 1:]) * self.times)

    def jacobian(self, theta):
        change = self.signal(theta) * self.times
        return np.stack([-change, 1j * change], axis=2)


FID = Oscillation(np.linspace(0, 2, 24))


class TestComplexSignals:
    theta = FID.sample(30, np.random.default_rng(8))

    def test_closed_form(self):
        """Rate and frequency turn the signal in orthogonal directions, as do the two parts of M0.

        Rate and Re M0 are then a straight line through the times, weighted by the squared
        signal: the slope has variance sigma^2 / sum w (t - mean)^2. So has the frequency.
        """
        weight = np.exp(-2 * self.theta[:, :1] * FID.times)
        mean = np.sum(weight * FID.times, axis=1, keepdims=True) / weight.sum(axis=1, keepdims=True)
        expected = 0.1**2 / np.sum(weight * (FID.times - mean) ** 2, axis=1)
        bound = cramer_rao_bound(FID, ComplexGaussian(0.1), self.theta)
        assert bound.shape == (30, 2)
        np.testing.assert_allclose(bound[:, 0], expected, rtol=1e-9)
        np.testing.assert_allclose(bound[:, 1], expected, rtol=1e-9)

    def test_information_is_the_real_part(self):
        information = fisher_information(FID, ComplexGaussian(0.5), self.theta)
        columns = with_amplitude(FID.signal(self.theta), FID.jacobian(self.theta))
        expected = 4 * np.einsum("vmp,vmq->vpq", columns.conj(), columns).real
        np.testing.assert_allclose(information, expected, atol=1e-12)
        inverse = np.diagonal(np.linalg.inv(information), axis1=1, axis2=2)
        bound = cramer_rao_bound(FID, ComplexGaussian(0.5), self.theta)
        np.testing.assert_allclose(bound, inverse[:, :2], rtol=1e-9)

    def test_unknown_amplitude_costs_and_known_one_does_not(self):
        jacobian = FID.jacobian(self.theta)
        known = bound_from_jacobian(jacobian, 0.1)
        np.testing.assert_allclose(known, 0.01 / np.sum(np.abs(jacobian) ** 2, axis=1), rtol=1e-9)
        assert np.all(cramer_rao_bound(FID, ComplexGaussian(0.1), self.theta) > known)

    @pytest.mark.parametrize("amplitude", [0.1, 3.0, -2.0, 0.3 - 0.4j])
    def test_bound_falls_with_the_squared_amplitude(self, amplitude):
        signal, jacobian = FID.signal(self.theta), FID.jacobian(self.theta)
        one = bound_from_jacobian(with_amplitude(signal, jacobian), 0.1)[:, :2]
        # The amplitude scales signal and derivatives; its own columns keep their length.
        columns = with_amplitude(signal, amplitude * jacobian)
        scaled = bound_from_jacobian(columns, 0.1)[:, :2]
        np.testing.assert_allclose(scaled, one / abs(amplitude) ** 2, rtol=1e-9)

    def test_ten_times_the_noise_a_hundred_times_the_variance(self):
        one, ten = (
            cramer_rao_bound(FID, ComplexGaussian(sigma), self.theta) for sigma in (0.02, 0.2)
        )
        np.testing.assert_allclose(ten, 100 * one, rtol=1e-12)

    def test_units_do_not_matter(self):
        """m0s is 0.1 and T2s 1e-5 s: rescaled columns rescale the bounds, digit for digit."""
        columns = with_amplitude(FID.signal(self.theta), FID.jacobian(self.theta))
        scale = np.array([1e-9, 1e7, 1.0, 1e4])
        np.testing.assert_allclose(
            bound_from_jacobian(columns * scale, 0.1),
            bound_from_jacobian(columns, 0.1) / scale**2,
            rtol=1e-9,
        )

    def test_least_squares_in_a_linear_model_reaches_it(self):
        """Real unknowns of a linear complex model: real and imaginary part as two measurements."""
        rng = np.random.default_rng(9)
        design = rng.standard_normal((12, 6)).view(complex)  # 12 measurements, 3 real unknowns
        truth, repeats, sigma = np.array([1.0, -2.0, 0.5]), 40_000, 0.3
        clean = np.broadcast_to(design @ truth, (repeats, 12))
        measured = ComplexGaussian(sigma).sample(clean, rng)
        stacked = np.concatenate([design.real, design.imag])
        channels = np.concatenate([measured.real, measured.imag], axis=1)
        estimates = channels @ np.linalg.pinv(stacked).T
        bound = bound_from_jacobian(design[np.newaxis], sigma)[0]
        np.testing.assert_allclose(
            estimates.var(axis=0) / bound, 1, atol=4.5 * np.sqrt(2 / repeats)
        )

    def test_maximum_likelihood_with_an_unknown_amplitude_reaches_it(self):
        """One Gauss-Newton step from the truth is the estimate at high SNR, with M0 as a nuisance.

        The step here is written by hand, on M0, rate and frequency, for |M0| = 0.5.
        """
        theta, amplitude, sigma, repeats = np.array([[1.2, 2.0]]), 0.3 - 0.4j, 1e-4, 20_000
        clean = amplitude * FID.signal(theta)
        measured = ComplexGaussian(sigma).sample(np.repeat(clean, repeats, axis=0),
                                                 np.random.default_rng(10))  # fmt: skip
        s, t = FID.signal(theta)[0], FID.times
        columns = np.stack([-amplitude * t * s, 1j * amplitude * t * s, s, 1j * s], axis=1)
        stacked = np.concatenate([columns.real, columns.imag])
        residual = measured - clean
        channels = np.concatenate([residual.real, residual.imag], axis=1)
        errors = (channels @ np.linalg.pinv(stacked).T)[:, :2]
        bound = cramer_rao_bound(FID, ComplexGaussian(sigma), theta)[0] / abs(amplitude) ** 2
        np.testing.assert_allclose(errors.var(axis=0) / bound, 1, atol=4.5 * np.sqrt(2 / repeats))

    def test_one_sigma_per_measurement(self):
        """Infinitely noisy measurements are as good as none."""
        columns = with_amplitude(FID.signal(self.theta), FID.jacobian(self.theta))
        sigma = np.where(np.arange(24) < 12, 0.1, 1e6)[np.newaxis]
        np.testing.assert_allclose(
            bound_from_jacobian(columns, sigma),
            bound_from_jacobian(columns[:, :12], 0.1),
            rtol=1e-6,
        )

    def test_one_sigma_per_voxel(self):
        columns = with_amplitude(FID.signal(self.theta), FID.jacobian(self.theta))
        sigma = np.linspace(0.1, 1, 30)[:, np.newaxis]
        np.testing.assert_allclose(
            bound_from_jacobian(columns, sigma), sigma**2 * bound_from_jacobian(columns, 1.0)
        )

    def test_many_voxels_are_worked_on_in_blocks(self):
        rng = np.random.default_rng(11)
        jacobian = rng.standard_normal((500, 1200, 8)).view(complex)
        together = bound_from_jacobian(jacobian, 0.1)
        alone = np.concatenate([bound_from_jacobian(one[np.newaxis], 0.1) for one in jacobian])
        np.testing.assert_allclose(together, alone, rtol=1e-9)
        assert bound_from_jacobian(jacobian[:0], 0.1).shape == (0, 4)


class TestComplexUnidentifiable:
    def test_frequency_at_one_time_is_the_phase_of_the_amplitude(self):
        bound = cramer_rao_bound(Oscillation([0.5]), ComplexGaussian(0.1), [[1.0, 2.0]])
        assert np.isinf(bound).all()

    def test_only_what_is_singular_is_infinite(self):
        columns = with_amplitude(FID.signal([[1.0, 2.0]]), FID.jacobian([[1.0, 2.0]]))
        nothing = np.zeros((1, 24, 1))
        bound = bound_from_jacobian(np.concatenate([columns, nothing], axis=2), 0.1)[0]
        assert np.isinf(bound[4])
        np.testing.assert_allclose(bound[:4], bound_from_jacobian(columns, 0.1)[0], rtol=1e-9)
        doubled = np.concatenate([columns, 3 * columns[:, :, :1]], axis=2)
        bound = bound_from_jacobian(doubled, 0.1)[0]
        assert np.isinf(bound[[0, 4]]).all() and np.isfinite(bound[1:4]).all()

    def test_all_zero(self):
        assert np.isinf(bound_from_jacobian(np.zeros((2, 5, 3), dtype=complex), 0.1)).all()


class TestComplexParameters:
    """The inverse of the complex matrix is the bound of parameters that may be complex."""

    def columns(self, seed):
        rng = np.random.default_rng(seed)
        return rng.standard_normal((200, 13, 16)).view(complex)  # 7 parameters and M0

    def test_never_below_the_bound_of_real_parameters(self):
        columns = self.columns(12)
        real = with_amplitude(columns[:, :, -1], columns[:, :, :-1])
        ratio = (
            bound_with_complex_parameters(columns, 0.1)[:, :7]
            / (bound_from_jacobian(real, 0.1)[:, :7])
        )
        assert np.all(ratio > 1 - 1e-9)
        assert ratio.max() > 1.5

    def test_is_the_inverse_of_the_complex_matrix(self):
        columns = self.columns(13)
        matrix = np.einsum("vmp,vmq->vpq", columns.conj(), columns) / 0.2**2
        inverse = np.diagonal(np.linalg.inv(matrix), axis1=1, axis2=2).real
        np.testing.assert_allclose(bound_with_complex_parameters(columns, 0.2), inverse, rtol=1e-8)

    def test_the_same_where_every_column_is_real(self):
        columns = self.columns(14).real
        np.testing.assert_allclose(
            bound_with_complex_parameters(columns.astype(complex), 0.1),
            bound_from_jacobian(columns, 0.1),
            rtol=1e-9,
        )

    def test_two_columns_for_the_amplitude_are_singular(self):
        columns = with_amplitude(FID.signal([[1.0, 2.0]]), FID.jacobian([[1.0, 2.0]]))
        assert np.isinf(bound_with_complex_parameters(columns, 0.1)[0]).all()


class TestComplexBadInput:
    def test_noise_of_the_wrong_kind(self):
        with pytest.raises(ValueError, match="noise must be ComplexGaussian .* complex signals"):
            cramer_rao_bound(FID, Gaussian(0.1), [[1.0, 2.0]])
        with pytest.raises(ValueError, match=r"noise must be Gaussian or Rician .* real signals"):
            cramer_rao_bound(MODEL, ComplexGaussian(0.1), [[1.0, 0.3, 1.0, 50.0]])

    def test_arrays(self):
        with pytest.raises(ValueError, match=r"jacobian must have shape .* got \(3, 4\)"):
            bound_from_jacobian(np.ones((3, 4)), 0.1)
        with pytest.raises(ValueError, match=r"jacobian must be finite, got 1 voxels .* voxel 2\)"):
            bound_from_jacobian(np.where(np.arange(4) == 2, np.nan, 1.0)[:, None, None], 0.1)
        with pytest.raises(ValueError, match="sigma must hold positive"):
            bound_from_jacobian(np.ones((3, 4, 2)), 0.0)
        with pytest.raises(ValueError, match=r"sigma must broadcast to .* = \(3, 4\)"):
            bound_with_complex_parameters(np.ones((3, 4, 2)), np.ones((3, 2)))
        with pytest.raises(ValueError, match=r"got \(2, 4, 2\) for \(3, 4\)"):
            with_amplitude(np.ones((3, 4)), np.ones((2, 4, 2)))
