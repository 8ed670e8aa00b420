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
