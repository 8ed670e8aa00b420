"""Maximum likelihood: against SciPy, against the truth, and with data that go wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mle import loop as scipy_loop  # benchmarks/mle.py: the loop that a reader would write

from qmri import (
    IVIM,
    FunctionModel,
    Gaussian,
    MaximumLikelihood,
    Parameter,
    Rician,
    cramer_rao_bound,
    fit_mle,
)

PAPER_BVALUES = (0, 10, 20, 30, 50, 80, 100, 200, 400, 800)
NOISES = [Gaussian, Rician]
MODEL = IVIM(PAPER_BVALUES)


def tissue_and_signals(snr, voxels, seed):
    rng = np.random.default_rng(seed)
    theta = MODEL.sample(voxels, rng)
    return theta, Rician(1 / snr).sample(MODEL.signal(theta), rng)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", NOISES)
def test_never_worse_than_scipy_from_the_same_start(kind):
    """10,000 voxels at SNR 15, a quarter of them with the optimum on a bound."""
    sigma = 1 / 15
    theta, signals = tissue_and_signals(15, 10_000, seed=100)
    noise = kind(sigma)
    fit = fit_mle(MODEL, noise, signals, start=theta)
    reference = scipy_loop(kind, sigma, signals, theta)
    theirs = noise.nll(signals, MODEL.signal(reference)).sum(axis=1)
    assert np.mean(fit.at_bound) > 0.1
    # A millionth of a nat: SciPy itself stops at about a hundred-millionth of the value.
    assert np.max(fit.nll - theirs) < 1e-6


@pytest.mark.parametrize("kind", NOISES)
def test_starts_from_the_data_hardly_ever_lose_to_the_truth(kind):
    theta, signals = tissue_and_signals(15, 20_000, seed=101)
    noise = kind(1 / 15)
    from_truth = fit_mle(MODEL, noise, signals, start=theta)
    from_data = fit_mle(MODEL, noise, signals)
    assert np.mean(from_data.nll > from_truth.nll + 1e-6) < 0.02


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("snr", [15, 30])
def test_first_order_conditions_hold_where_converged(kind, snr):
    """At the end no parameter, moved by a standard error within its bounds, gains anything."""
    _, signals = tissue_and_signals(snr, 5_000, seed=102)
    noise = kind(1 / snr)
    fit = fit_mle(MODEL, noise, signals)
    assert np.mean(fit.converged) > 0.995
    clean, jacobian = MODEL.signal_and_jacobian(fit.theta)
    slope = np.einsum("vm,vmp->vp", noise.nll_gradient(signals, clean), jacobian)
    error = 1 / np.sqrt(np.einsum("vm,vmp->vp", noise.fisher_information(clean), jacobian**2))
    outward = np.sign(slope) == -fit.bound_hit
    gain = np.where(outward, 0.0, np.abs(slope) * error)[fit.converged]
    assert np.max(gain) < 1e-3


@pytest.mark.parametrize("noise", [Gaussian(1e-4), Rician(1e-4)])
def test_without_noise_the_truth_comes_back(noise):
    theta = MODEL.sample(500, np.random.default_rng(103))
    fit = fit_mle(MODEL, noise, MODEL.signal(theta))
    assert fit.converged.all()
    # Rician likelihood peaks about sigma^2 / (2 s) away from the signal.
    np.testing.assert_allclose(fit.theta, theta, rtol=1e-3)


def test_gaussian_likelihood_is_least_squares():
    """A straight line, whose least-squares solution needs no iteration."""
    x = np.linspace(0, 2, 7)
    model = line(x)
    rng = np.random.default_rng(104)
    measured = Gaussian(0.3).sample(model.signal(model.sample(200, rng)), rng)
    intercept_and_slope = np.polyfit(x, measured.T, 1).T[:, ::-1]
    error = np.sqrt(cramer_rao_bound(model, Gaussian(0.3), [[0.0, 0.0]])[0])
    difference = fit_mle(model, Gaussian(0.3), measured).theta - intercept_and_slope
    # The iteration ends when a step gains less than 1e-8 nats: 1.4e-4 standard errors.
    assert np.all(np.abs(difference) < 1e-3 * error)


def line(x):
    return FunctionModel(
        lambda t, a, b: a + b * t,
        x,
        [
            Parameter("a", "a", "1", (-1, 1), (-100, 100)),
            Parameter("b", "b", "1", (-1, 1), (-100, 100)),
        ],
    )


def test_rician_likelihood_removes_the_bias_of_the_floor():
    """Fast-diffusing tissue at SNR 15: the floor at high b makes least squares too slow."""
    theta = np.broadcast_to([1.0, 0.2, 2.8, 60.0], (20_000, 4))
    signals = Rician(1 / 15).sample(MODEL.signal(theta), np.random.default_rng(105))
    bias = {
        kind: np.median(fit_mle(MODEL, kind(1 / 15), signals).theta[:, 2]) - 2.8 for kind in NOISES
    }
    assert bias[Gaussian] < -0.1
    assert abs(bias[Rician]) < 0.5 * abs(bias[Gaussian])


class TestBounds:
    def test_estimates_stay_inside_and_hits_are_flagged(self):
        _, signals = tissue_and_signals(15, 5_000, seed=106)
        fit = fit_mle(MODEL, Rician(1 / 15), signals)
        low, high = MODEL.bounds.T
        assert np.all((fit.theta >= low) & (fit.theta <= high))
        np.testing.assert_array_equal(fit.bound_hit == -1, fit.theta == low)
        np.testing.assert_array_equal(fit.bound_hit == 1, fit.theta == high)
        np.testing.assert_array_equal(fit.at_bound, (fit.bound_hit != 0).any(axis=1))

    def test_tissue_without_perfusion_ends_on_the_lower_bound_of_f(self):
        signals = MODEL.signal([[1.0, 0.0, 1.0, 50.0]])
        fit = fit_mle(MODEL, Gaussian(0.01), signals)
        assert fit.bound_hit[0, 1] == -1 and fit.at_bound[0]

    def test_named_bounds_replace_the_models(self):
        theta = np.array([[1.0, 0.8, 1.0, 40.0]])
        signals = MODEL.signal(theta)
        held = fit_mle(MODEL, Gaussian(0.01), signals)
        free = fit_mle(MODEL, Gaussian(0.01), signals, bounds={"f": (0, 1)})
        assert held.theta[0, 1] == 0.5 and held.at_bound[0]
        np.testing.assert_allclose(free.theta, theta, rtol=1e-4)
        assert not free.at_bound[0]

    def test_equal_bounds_fix_a_parameter(self):
        _, signals = tissue_and_signals(50, 200, seed=107)
        fit = fit_mle(MODEL, Rician(1 / 50), signals, bounds={"Dfast": (30, 30)})
        assert np.all(fit.theta[:, 3] == 30)
        assert np.all(fit.bound_hit[:, 3] == 0)

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ({"D": (0, 1)}, "bounds must name parameters among.*got 'D'"),
            ({"f": (1, 0)}, r"bounds\['f'\] must be a finite \(low, high\).*\(1, 0\)"),
            ({"f": (0, np.nan)}, r"bounds\['f'\]"),
            ({"f": (0, np.inf)}, r"bounds\['f'\]"),
            ({"f": 0.3}, r"bounds\['f'\]"),
        ],
    )
    def test_bad_bounds_are_named(self, bounds, message):
        with pytest.raises(ValueError, match=message):
            fit_mle(MODEL, Gaussian(0.1), np.ones((1, 10)), bounds=bounds)
        with pytest.raises(ValueError, match=message):
            MaximumLikelihood(MODEL, Gaussian(0.1), bounds=bounds)


class TestStart:
    def test_one_start_serves_all_voxels(self):
        _, signals = tissue_and_signals(40, 50, seed=108)
        begin = [1.0, 0.3, 1.5, 50.0]
        one = fit_mle(MODEL, Rician(1 / 40), signals, start=begin)
        each = fit_mle(MODEL, Rician(1 / 40), signals, start=np.tile(begin, (50, 1)))
        np.testing.assert_array_equal(one.theta, each.theta)

    @pytest.mark.parametrize(
        ("start", "message"),
        [
            (np.ones((3, 4)), r"start must have shape \(2, 4\) or \(4,\), got \(3, 4\)"),
            ([1.0, 0.7, 1.0, 50.0], "f of voxel 0 is 0.7, expected 0.01 to 0.5"),
            ([1.0, np.nan, 1.0, 50.0], "f of voxel 0 is nan"),
            ([[1, 0.3, 1, 50], [1, 0.3, 1, 500]], "Dfast of voxel 1 is 500, expected 2 to 300"),
        ],
    )
    def test_bad_start_is_named(self, start, message):
        with pytest.raises(ValueError, match=message):
            fit_mle(MODEL, Gaussian(0.1), np.ones((2, 10)), start=start)


class TestBadVoxels:
    @pytest.mark.parametrize("kind", NOISES)
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_bad_voxel_is_nan_and_spoils_nobody(self, kind, bad):
        _, signals = tissue_and_signals(20, 300, seed=109)
        alone = fit_mle(MODEL, kind(1 / 20), np.delete(signals, 123, axis=0))
        signals[123, 4] = bad
        fit = fit_mle(MODEL, kind(1 / 20), signals)
        assert np.isnan(fit.theta[123]).all() and np.isnan(fit.nll[123])
        assert not fit.converged[123] and not fit.at_bound[123]
        np.testing.assert_array_equal(np.delete(fit.theta, 123, axis=0), alone.theta)

    def test_negative_magnitudes_are_impossible_under_rician_noise_only(self):
        _, signals = tissue_and_signals(20, 3, seed=110)
        signals[1, 9] = -0.01
        assert np.isnan(fit_mle(MODEL, Rician(0.05), signals).theta[1]).all()
        assert np.isfinite(fit_mle(MODEL, Gaussian(0.05), signals).theta).all()

    def test_a_magnitude_of_zero_is_fitted(self):
        # Scanners store integers: 0 is a rounded small magnitude.
        _, signals = tissue_and_signals(20, 3, seed=111)
        signals[1, 9] = 0.0
        fit = fit_mle(MODEL, Rician(0.05), signals)
        assert np.isfinite(fit.theta[1]).all() and fit.converged[1]

    @pytest.mark.parametrize("kind", NOISES)
    def test_dark_voxels_end_within_bounds(self, kind):
        fit = fit_mle(MODEL, kind(0.05), np.zeros((2, 10)))
        low, high = MODEL.bounds.T
        assert np.all((fit.theta >= low) & (fit.theta <= high))

    def test_no_voxels(self):
        fit = fit_mle(MODEL, Rician(0.1), np.empty((0, 10)))
        assert fit.theta.shape == (0, 4) and fit.nll.shape == fit.at_bound.shape == (0,)

    def test_nothing_but_bad_voxels(self):
        fit = fit_mle(MODEL, Rician(0.1), np.full((2, 10), np.nan))
        assert np.isnan(fit.theta).all() and not fit.converged.any()

    @pytest.mark.parametrize(
        ("signals", "message"),
        [
            (np.ones(10), r"signals must have shape \(voxels, 10\).*got \(10,\)"),
            (np.ones((2, 9)), r"got \(2, 9\)"),
            (np.ones((2, 10)) * 1j, "signals must be real"),
        ],
    )
    def test_wrong_signals_are_refused(self, signals, message):
        with pytest.raises(ValueError, match=message):
            fit_mle(MODEL, Gaussian(0.1), signals)

    def test_a_model_that_breaks_down_gives_nan_there_only(self):
        model = FunctionModel(
            lambda t, a: math.exp(-t / a) if a < 1 else math.nan,
            [0.1, 0.2, 0.4],
            [Parameter("a", "a", "s", (0.2, 0.9), (0.1, 2.0))],
        )
        signals = model.signal([[0.5], [0.5]])
        fit = fit_mle(model, Gaussian(0.01), signals, start=[[0.4], [0.8]])
        np.testing.assert_allclose(fit.theta, 0.5, rtol=1e-6)

    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        voxels=st.integers(1, 40),
        scale=st.floats(1e-3, 1e4),
        rician=st.booleans(),
    )
    def test_any_finite_signal_gives_an_estimate_within_bounds(self, seed, voxels, scale, rician):
        rng = np.random.default_rng(seed)
        signals = scale * rng.exponential(size=(voxels, 10))
        noise = (Rician if rician else Gaussian)(scale / 10)
        fit = fit_mle(MODEL, noise, signals)
        low, high = MODEL.bounds.T
        assert np.all((fit.theta >= low) & (fit.theta <= high))
        assert np.isfinite(fit.nll).all()


class TestConsistency:
    def test_neighbours_and_order_do_not_matter(self):
        _, signals = tissue_and_signals(15, 9_000, seed=112)
        order = np.random.default_rng(0).permutation(len(signals))
        straight = fit_mle(MODEL, Rician(1 / 15), signals)
        shuffled = fit_mle(MODEL, Rician(1 / 15), signals[order])
        np.testing.assert_array_equal(shuffled.theta, straight.theta[order])

    @pytest.mark.parametrize("kind", NOISES)
    def test_unit_of_the_signal_does_not_matter(self, kind):
        _, signals = tissue_and_signals(30, 300, seed=113)
        ours = fit_mle(MODEL, kind(1 / 30), signals)
        scanner = fit_mle(MODEL, kind(400 / 30), signals * 400)
        same = ours.converged & scanner.converged
        # To a thousandth of the spread that noise causes, well below what anyone could see.
        spread = np.std(ours.theta, axis=0)
        scaled = scanner.theta[same] / [400, 1, 1, 1]
        assert np.median(np.abs(scaled - ours.theta[same]) / spread) < 1e-6
        np.testing.assert_allclose(scanner.nll[same] - ours.nll[same], 10 * np.log(400), atol=1e-6)

    def test_one_sigma_per_voxel(self):
        _, signals = tissue_and_signals(20, 40, seed=114)
        sigmas = np.linspace(0.03, 0.1, 40)[:, np.newaxis]
        together = fit_mle(MODEL, Rician(sigmas), signals)
        for v in (0, 17, 39):
            alone = fit_mle(MODEL, Rician(float(sigmas[v, 0])), signals[v : v + 1])
            np.testing.assert_allclose(together.theta[v], alone.theta[0], rtol=1e-10)

    def test_reported_nll_is_the_noise_models(self):
        _, signals = tissue_and_signals(20, 40, seed=115)
        noise = Rician(0.05)
        fit = fit_mle(MODEL, noise, signals)
        np.testing.assert_allclose(
            fit.nll, noise.nll(signals, MODEL.signal(fit.theta)).sum(axis=1), rtol=1e-12
        )

    def test_estimator_is_the_fit(self):
        _, signals = tissue_and_signals(20, 40, seed=116)
        estimator = MaximumLikelihood(MODEL, Rician(0.05))
        np.testing.assert_array_equal(
            estimator.estimate(signals), fit_mle(MODEL, Rician(0.05), signals).theta
        )
        assert estimator.names == MODEL.names and estimator.units == MODEL.units

    def test_progress_bar_goes_to_standard_error(self, capsys):
        _, signals = tissue_and_signals(20, 10, seed=117)
        fit_mle(MODEL, Rician(0.05), signals)
        assert capsys.readouterr() == ("", "")
        fit_mle(MODEL, Rician(0.05), signals, progress=True)
        out, err = capsys.readouterr()
        assert out == "" and "10/10" in err


def test_a_readers_model_fits_like_the_librarys():
    mine = FunctionModel(
        lambda b, S0, f, Dslow, Dfast: (
            S0 * math.exp(-b * Dslow * 1e-3) * (f * math.exp(-b * Dfast * 1e-3) + 1 - f)
        ),
        PAPER_BVALUES,
        MODEL.parameters,
        amplitude="S0",
    )
    theta, signals = tissue_and_signals(30, 2_000, seed=118)
    ours = fit_mle(MODEL, Rician(1 / 30), signals, start=theta)
    theirs = fit_mle(mine, Rician(1 / 30), signals, start=theta)
    worse = theirs.nll > ours.nll + 1e-5
    assert np.mean(worse) < 0.005


_FIRST_CALL = """
import json, sys, time
import numpy as np
from qmri import IVIM, Gaussian, Rician, fit_mle
model = IVIM([0, 10, 20, 30, 50, 80, 100, 200, 400, 800])
seconds = []
for noise in (Gaussian(0.05), Rician(0.05)):
    begin = time.perf_counter()
    fit_mle(model, noise, model.signal(model.sample(10, np.random.default_rng(0))))
    seconds.append(time.perf_counter() - begin)
print(json.dumps(seconds))
"""


@pytest.mark.slow
def test_second_process_finds_the_compiled_solver_on_disk():
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", _FIRST_CALL], capture_output=True, text=True, check=True
        )
    assert max(json.loads(run.stdout)) < 3.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", NOISES)
def test_hundreds_of_times_faster_than_the_loop(kind):
    """A guard against losing the compiled path; `make bench` measures the ratio properly."""
    theta, signals = tissue_and_signals(30, 50_000, seed=119)
    noise = kind(1 / 30)
    fit_mle(MODEL, noise, signals[:100], start=theta[:100])
    begin = time.perf_counter()
    fit_mle(MODEL, noise, signals, start=theta)
    ours = (time.perf_counter() - begin) / len(signals)
    begin = time.perf_counter()
    scipy_loop(kind, 1 / 30, signals[:200], theta[:200])
    theirs = (time.perf_counter() - begin) / 200
    assert theirs / ours > 200
