"""Least squares on fingerprints: against the truth, SciPy and the Cramer-Rao bound."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import least_squares

from qmri.crb import cramer_rao_bound
from qmri.mt.basis import svd_basis
from qmri.mt.model import MTModel
from qmri.mt.nlls import NLLS, fit_nlls
from qmri.mt.train import PulseTrain
from qmri.noise import ComplexGaussian

NAMES = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
WHITE_MATTER = np.array([0.18, 1.6, 0.07, 25.0, 12e-6, 150.0, 0.95])


@pytest.fixture(scope="module")
def model():
    """A short train: 13 numbers identify all parameters, given little enough noise."""
    train = PulseTrain.default(200)
    signals = MTModel(train).signal(MTModel(train).sample(1000, np.random.default_rng(0)))
    return MTModel(train, svd_basis(np.concatenate([signals, signals.conj()]), 13)[0])


def tissue_near(voxels, seed, spread=0.05):
    rng = np.random.default_rng(seed)
    return WHITE_MATTER * (1 + spread * rng.uniform(-1, 1, (voxels, 7)))


class TestWithoutNoise:
    def test_the_truth_comes_back_with_amplitude_and_phase(self, model):
        truth = tissue_near(16, seed=1)
        m0 = np.linspace(0.2, 30, 16) * np.exp(1j * np.linspace(0, 2 * np.pi, 16))
        fit = fit_nlls(
            model, m0[:, np.newaxis] * model.signal(truth), start=tissue_near(16, seed=2)
        )
        assert fit.converged.all() and not fit.at_bound.any()
        np.testing.assert_allclose(fit.theta, truth, rtol=1e-5)
        np.testing.assert_allclose(fit.m0, m0, rtol=1e-5)
        assert np.all(fit.cost < 1e-16 * np.abs(m0) ** 2)

    def test_the_dictionary_leads_to_the_truth(self, model):
        """Tissue from the whole distribution; the fit knows nothing but the signal."""
        truth = model.sample(24, np.random.default_rng(3))
        fit = fit_nlls(model, model.signal(truth))
        found = np.all(np.isclose(fit.theta, truth, rtol=1e-3, atol=1e-9), axis=1)
        assert np.mean(found) > 0.75  # the short train has other minima that hardly differ
        # Elsewhere the signal is nearly the same: to 1 % of its length.
        assert np.all(fit.cost < 1e-4 * np.sum(np.abs(model.signal(truth)) ** 2, axis=1))

    def test_more_starts_never_end_higher(self, model):
        signals = model.signal(model.sample(16, np.random.default_rng(4)))
        one, three = fit_nlls(model, signals, starts=1), fit_nlls(model, signals, starts=3)
        assert np.all(three.cost <= one.cost * (1 + 1e-6) + 1e-18)
        assert np.all(three.iterations > one.iterations)

    def test_pulse_by_pulse_gives_the_same_tissue_as_in_the_basis(self, model):
        truth, start = tissue_near(8, seed=5), tissue_near(8, seed=6)
        every_pulse = MTModel(model.train)
        fit = fit_nlls(every_pulse, every_pulse.signal(truth), start=start)
        np.testing.assert_allclose(fit.theta, truth, rtol=1e-5)


def scipy_fit(model, measured, start, low, high):
    """One voxel: T2f as a share of T1, so that T2f <= T1 is a bound; M0 as two more unknowns."""
    scale = np.array([0.1, 1, 1, 20, 1e-5, 500, 1])

    def tissue(x):
        theta = x[:7] * scale
        theta[2] *= theta[1]
        return theta[np.newaxis]

    def residual(x):
        difference = (x[7] + 1j * x[8]) * model.signal(tissue(x))[0] - measured
        return np.concatenate([difference.real, difference.imag])

    def jacobian(x):
        theta = tissue(x)
        signal, derivative = (a[0] for a in model.signal_and_jacobian(theta))
        derivative = (x[7] + 1j * x[8]) * derivative
        derivative[:, 1] += derivative[:, 2] * theta[0, 2] / theta[0, 1]
        derivative[:, 2] *= theta[0, 1]
        columns = np.column_stack([derivative * scale, signal, 1j * signal])
        return np.concatenate([columns.real, columns.imag])

    begin = start.copy()
    begin[2] /= begin[1]
    signal = model.signal(start[np.newaxis])[0]
    m0 = np.vdot(signal, measured) / np.vdot(signal, signal)
    low, high = low.copy(), high.copy()
    low[2], high[2] = low[2] / start[1] * 1e-3, 1.0
    return least_squares(
        residual,
        np.concatenate([begin / scale, [m0.real, m0.imag]]),
        jacobian,
        bounds=(
            np.concatenate([low / scale, [-np.inf] * 2]),
            np.concatenate([high / scale, [np.inf] * 2]),
        ),
        xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=300,
    )  # fmt: skip


@pytest.mark.parametrize("sigma", [1e-4, 3e-3])
def test_never_worse_than_scipy_from_the_same_start(model, sigma):
    """With much noise some estimates lie on bounds, with little the minimum is sharp."""
    truth, start = tissue_near(8, seed=7), tissue_near(8, seed=8)
    measured = ComplexGaussian(sigma).sample(model.signal(truth), np.random.default_rng(9))
    low, high = model.bounds.T.copy()
    high[6] = 1.99
    bounds = {"B1": (low[6], high[6])}
    fit = fit_nlls(model, measured, start=start, bounds=bounds, max_iterations=1000)
    theirs = [scipy_fit(model, m, s, low, high) for m, s in zip(measured, start, strict=True)]
    cost = np.array([2 * result.cost for result in theirs])
    # A ten-thousandth of the noise's variance.
    assert np.all(fit.cost < cost + 1e-4 * sigma**2)


SIGMA = 1e-5


@pytest.fixture(scope="module")
def repeats(model):
    """The fit of 400 repeats, and the square root of the bound."""
    truth = WHITE_MATTER[np.newaxis]
    m0 = 2 * np.exp(0.7j)
    clean = np.repeat(m0 * model.signal(truth), 400, axis=0)
    measured = ComplexGaussian(SIGMA).sample(clean, np.random.default_rng(10))
    bound = cramer_rao_bound(model, ComplexGaussian(SIGMA), truth)[0] / abs(m0) ** 2
    return fit_nlls(model, measured, start=WHITE_MATTER), np.sqrt(bound)


class TestNoise:
    def test_the_fit_is_efficient(self, repeats):
        """The SD of 400 repeats has a relative error of 1 / sqrt(800) = 3.5 %."""
        fit, sd = repeats
        assert fit.converged.all()
        np.testing.assert_allclose(fit.theta.std(axis=0, ddof=1), sd, rtol=4 * 0.035)

    def test_and_unbiased(self, repeats):
        """The mean of 400 repeats has a standard error of a twentieth of the SD."""
        fit, sd = repeats
        assert np.all(np.abs(fit.theta.mean(axis=0) - WHITE_MATTER) < 4 * sd / 20)

    def test_what_is_left_over_is_the_noise_less_nine_unknowns(self, repeats):
        """26 real numbers, 7 parameters and a complex M0: chi-squared with 17 degrees."""
        fit, _ = repeats
        standard_error = np.sqrt(2 * 17 / 400)
        assert abs(np.mean(fit.cost) / SIGMA**2 - 17) < 4 * standard_error


class TestBounds:
    def test_t2f_never_exceeds_t1(self, model):
        """Water-like tissue with T2f = T1: noise pushes half of the estimates beyond."""
        truth = np.tile(WHITE_MATTER, (32, 1))
        truth[:, 1:3] = 1.5
        noise = ComplexGaussian(1e-3)
        measured = noise.sample(model.signal(truth), np.random.default_rng(11))
        fit = fit_nlls(model, measured, start=truth)
        assert np.all(fit.theta[:, 2] <= fit.theta[:, 1])
        on_t1 = fit.theta[:, 2] == fit.theta[:, 1]
        assert 0.15 < np.mean(on_t1) < 0.85
        assert np.all(fit.at_bound[on_t1, 2])

    def test_a_truth_outside_the_bounds_ends_on_them(self, model):
        truth = tissue_near(8, seed=12)
        start = truth.copy()
        start[:, 6] = 1.2
        fit = fit_nlls(model, model.signal(truth), start=start, bounds={"B1": (1.1, 1.5)})
        assert np.all(fit.theta[:, 6] == 1.1) and np.all(fit.at_bound[:, 6])

    def test_a_fixed_parameter_stays_and_is_not_caught(self, model):
        truth = tissue_near(8, seed=13)
        truth[:, 4] = 12e-6
        fit = fit_nlls(model, model.signal(truth), bounds={"T2s": (12e-6, 12e-6)})
        assert np.all(fit.theta[:, 4] == 12e-6) and not fit.at_bound[:, 4].any()
        np.testing.assert_allclose(fit.theta, truth, rtol=1e-4)

    def test_first_order_conditions_hold(self, model):
        """No parameter within its bounds, moved by a standard error, gains much."""
        sigma = 3e-3
        truth = tissue_near(32, seed=14)
        measured = ComplexGaussian(sigma).sample(model.signal(truth), np.random.default_rng(15))
        fit = fit_nlls(model, measured, start=truth, max_iterations=1000)
        clean, jacobian = model.signal_and_jacobian(fit.theta)
        residual = measured - fit.m0[:, np.newaxis] * clean
        jacobian = fit.m0[:, np.newaxis, np.newaxis] * jacobian
        slope = -np.einsum("vm,vmp->vp", residual.conj(), jacobian).real / sigma**2
        free = fit.converged[:, np.newaxis] & ~fit.at_bound
        free[:, 1] &= ~fit.at_bound[:, 2]
        error = sigma / np.linalg.norm(jacobian, axis=1)  # with all other parameters known
        assert np.mean(fit.converged) > 0.5
        assert np.max(np.abs(slope * error)[free]) < 1e-2


class TestEstimator:
    def test_has_the_models_names_and_leaves_out_what_cannot_be_fitted(self, model):
        truth = tissue_near(5, seed=16)
        signals = model.signal(truth)
        signals[1], signals[3, 2] = 0, np.nan
        estimator = NLLS(model, starts=1)
        assert estimator.names == NAMES and estimator.units[1] == "s"
        theta = estimator.estimate(signals)
        np.testing.assert_array_equal(
            np.isnan(theta).all(axis=1), [False, True, False, True, False]
        )
        np.testing.assert_allclose(theta[[0, 2, 4]], truth[[0, 2, 4]], rtol=1e-4)

    def test_no_voxels_are_no_problem(self, model):
        assert NLLS(model).estimate(np.empty((0, 13), dtype=complex)).shape == (0, 7)

    def test_neighbours_do_not_matter(self, model):
        signals = model.signal(tissue_near(12, seed=17))
        start = tissue_near(12, seed=18)
        together = fit_nlls(model, signals, start=start).theta
        alone = fit_nlls(model, signals[4:5], start=start[4:5]).theta
        np.testing.assert_allclose(alone, together[4:5], rtol=1e-8)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"coefficients": np.ones((2, 12), complex)}, r"coefficients .*\(voxels, 13\).*2, 12"),
            ({"coefficients": np.ones(13, complex)}, r"coefficients .*\(13,\)"),
            ({"coefficients": np.ones((2, 13))}, "coefficients must be complex, got float64"),
            ({"coefficients": np.full((2, 13), np.nan + 0j)}, "coefficients .* 2 of 2 voxels"),
            ({"coefficients": np.zeros((3, 13), complex)}, "coefficients .* 3 of 3 voxels"),
            ({"starts": 0}, "starts .* got 0"),
            ({"max_iterations": 0}, "max_iterations .* got 0"),
            ({"bounds": {"T2": (0, 1)}}, "bounds .* got 'T2'"),
            ({"bounds": {"T1": (2, 1)}}, r"bounds\['T1'\] .* got \(2, 1\)"),
            ({"bounds": {"T1": (0.1, 9)}}, r"bounds\['T1'\] must lie within .* 0.05 to 8"),
            ({"bounds": {"T1": (0.1, 0.2), "T2f": (0.3, 1)}}, "bounds .* T2f <= T1"),
            ({"start": np.ones(6)}, r"start must have shape \(1, 7\) or \(7,\)"),
            ({"start": WHITE_MATTER * 5}, "start must lie within the bounds: m0s of voxel 0"),
            ({"start": WHITE_MATTER[[0, 2, 1, 3, 4, 5, 6]]}, "start must have T2f <= T1"),
        ],
    )
    def test_is_refused_by_name(self, model, arguments, message):
        coefficients = arguments.pop("coefficients", np.ones((1, 13), complex))
        with pytest.raises(ValueError, match=message):
            fit_nlls(model, coefficients, **arguments)

    def test_of_the_estimator(self, model):
        with pytest.raises(ValueError, match="starts"):
            NLLS(model, starts=0)
        with pytest.raises(ValueError, match="model must be an MTModel"):
            NLLS(WHITE_MATTER)
        with pytest.raises(ValueError, match="coefficients must be complex"):
            NLLS(model).estimate(np.ones((2, 13)))
