"""Evaluation: estimators whose bias, spread and information are known beforehand."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from qmri import (
    IVIM,
    ComplexGaussian,
    FunctionModel,
    Gaussian,
    MaximumLikelihood,
    Parameter,
    Rician,
    cramer_rao_bound,
)
from qmri.evaluation import (
    Grid,
    GridAccumulator,
    GridStatistics,
    blocks,
    densities,
    difference_map,
    evaluate,
    marginal,
    mean_map,
    mutual_information,
    repeat_statistics,
    slope,
    summary,
)

MODEL = IVIM([0, 10, 20, 30, 50, 80, 100, 200, 400, 800])
GRID = Grid.regular(MODEL)  # 10 x 10 x 10, as in the paper
VARIED = ("f", "Dslow", "Dfast")
NOISE = Rician(1 / 15)


class Estimator:
    """Any function of the signals."""

    def __init__(self, function, names=MODEL.names):
        self.estimate, self.names = function, names


def gather(grid, repeats, estimates_of):
    """Statistics of estimates that know the truth, ``estimates_of(theta)``."""
    gathered = GridAccumulator(grid, repeats)
    size = 100
    for first in range(0, len(grid), size):
        nodes = slice(first, min(first + size, len(grid)))
        gathered.add(nodes, estimates_of(np.repeat(grid.theta[nodes], repeats, axis=0)))
    return gathered.statistics()


CENTRE = MODEL.training.mean(axis=1)
TRUTH = gather(GRID, 2, lambda theta: theta)
CONSTANT = gather(GRID, 5, lambda theta: np.broadcast_to(CENTRE, theta.shape))
HALFWAY = gather(GRID, 2, lambda theta: 0.5 * (theta + CENTRE))


def test_grid_of_the_paper():
    assert GRID.shape == (10, 10, 10)
    assert len(GRID) == 1000
    assert tuple(GRID.axes) == VARIED
    np.testing.assert_array_equal(GRID.theta[:, 0], 1.0)
    # Each level of each parameter meets each pair of levels of the others once.
    assert len(np.unique(GRID.theta, axis=0)) == 1000
    for column, name in enumerate(VARIED, start=1):
        levels, counts = np.unique(GRID.theta[:, column], return_counts=True)
        np.testing.assert_allclose(levels, np.linspace(*MODEL.training[column], 10))
        assert set(counts) == {100}, name
    by_axes = GRID.theta.reshape(*GRID.shape, 4)
    np.testing.assert_array_equal(
        by_axes[3, 4, 5, 1:], [GRID.axes[n][i] for n, i in zip(VARIED, (3, 4, 5), strict=True)]
    )


def test_grid_keeps_the_order_of_the_model():
    axes = {"Dfast": [20, 40], "f": [0.1, 0.2, 0.3]}
    grid = Grid(MODEL, axes, {"Dslow": 1.0, "S0": 2.0})
    assert tuple(grid.axes) == ("f", "Dfast")
    assert grid.shape == (3, 2)
    np.testing.assert_array_equal(grid.theta[1], [2.0, 0.1, 1.0, 40.0])


def test_truth_has_no_error_and_all_information():
    np.testing.assert_array_equal(TRUTH.bias, 0.0)
    np.testing.assert_array_equal(TRUTH.sd, 0.0)
    np.testing.assert_array_equal(TRUTH.rmse, 0.0)
    for name in VARIED:
        assert slope(TRUTH, name) == pytest.approx(1.0)
        assert mutual_information(TRUTH, name) == pytest.approx(math.log2(10))


def test_constant_knows_nothing():
    np.testing.assert_allclose(CONSTANT.sd, 0.0, atol=1e-12)
    np.testing.assert_allclose(CONSTANT.bias, CENTRE - GRID.theta, atol=1e-12)
    for name in VARIED:
        assert slope(CONSTANT, name) == pytest.approx(0.0, abs=1e-12)
        assert mutual_information(CONSTANT, name) == 0.0
    # The RMSE of always answering the middle: the SD of ten equally spaced levels at most.
    step = 0.4 / 9
    rms = np.sqrt(np.mean(CONSTANT.rmse[:, 1] ** 2))
    assert rms == pytest.approx(step * math.sqrt((10**2 - 1) / 12))


def test_halfway_to_the_centre_has_slope_one_half_and_all_information():
    """Compression alone loses nothing that a look-up table could not restore."""
    for name in VARIED:
        assert slope(HALFWAY, name) == pytest.approx(0.5)
        assert mutual_information(HALFWAY, name) == pytest.approx(math.log2(10))


def test_known_noise_gives_known_bias_and_spread():
    repeats, offset = 400, np.array([0.0, 0.02, -0.1, 5.0])
    spread = np.array([0.05, 0.03, 0.2, 10.0])
    rng = np.random.default_rng(1)
    found = gather(
        GRID, repeats, lambda theta: theta + offset + spread * rng.standard_normal(theta.shape)
    )
    assert np.all(found.valid == repeats)
    # Of 4000 normal numbers one lies beyond 5 SDs in one case of 400.
    errors = (found.bias - offset) / (spread / math.sqrt(repeats))
    assert np.abs(errors).max() < 5
    np.testing.assert_allclose(errors.mean(axis=0), 0.0, atol=5 / math.sqrt(1000))
    np.testing.assert_allclose(errors.std(axis=0), 1.0, atol=5 / math.sqrt(2000))
    variance = (found.sd / spread) ** 2
    assert np.abs(variance - 1).max() < 6 * math.sqrt(2 / repeats)
    expected, error = 1 - 1 / repeats, math.sqrt(2 / repeats / 1000)
    np.testing.assert_allclose(variance.mean(axis=0), expected, atol=5 * error)
    for name in VARIED:
        assert slope(found, name) == pytest.approx(1.0, abs=0.01)


def test_mean_squared_error_is_squared_bias_plus_variance():
    repeats, rng, squared = 30, np.random.default_rng(2), []

    def skewed(theta):
        estimates = theta * rng.exponential(1.1, theta.shape)
        squared.append(((estimates - theta) ** 2).reshape(-1, repeats, 4).mean(axis=1))
        return estimates

    found = gather(GRID, repeats, skewed)
    np.testing.assert_allclose(found.rmse**2, np.concatenate(squared), rtol=1e-12)
    np.testing.assert_allclose(found.rmse**2, found.bias**2 + found.sd**2, rtol=1e-12)


def test_spread_keeps_its_digits_far_from_zero():
    """A spread of a millionth of the value: sums of squares about zero would lose it."""
    model = FunctionModel(
        lambda x, T: T * x, [1.0], [Parameter("T", "T", "K", (1e6, 2e6), (0.0, 3e6))]
    )
    grid = Grid(model, {"T": [1e6, 2e6]}, {})
    wobble = np.array([-1.0, 1.0, -1.0, 1.0])[:, np.newaxis] * 1e-3
    found = gather(grid, 4, lambda theta: theta + np.tile(wobble, (2, 1)))
    np.testing.assert_allclose(found.sd, 1e-3, rtol=1e-6)


@pytest.mark.parametrize("kind", [Gaussian, Rician])
def test_maximum_likelihood_reaches_the_cramer_rao_bound(kind):
    noise, repeats = kind(1e-4), 500
    grid = Grid(MODEL, {"f": [0.2, 0.4], "Dslow": [0.7, 2.0], "Dfast": [20, 60]}, {"S0": 1.0})
    found = evaluate(MaximumLikelihood(MODEL, noise), grid, noise, repeats, seed=3)
    bound = cramer_rao_bound(MODEL, noise, grid.theta)
    assert np.all(found.valid == repeats)
    # Variances of 500 estimates scatter by 6 %; no node may be off by more than five times that.
    np.testing.assert_allclose(found.sd**2 / bound, 1.0, atol=5 * math.sqrt(2 / repeats))
    assert np.all(np.abs(found.bias) < 5 * np.sqrt(bound / repeats))


def test_information_of_a_noisy_channel():
    """One bit through a channel that swaps it in one case of ten: 1 - H(0.1) bits."""
    model = FunctionModel(
        lambda x, p: p * x, [1.0], [Parameter("p", "p", "1", (0.2, 0.8), (0.0, 1.0))]
    )
    grid = Grid(model, {"p": [0.205, 0.795]}, {})
    swapped = (np.arange(1000) % 10 == 0)[:, np.newaxis]
    found = gather(grid, 1000, lambda theta: np.where(np.tile(swapped, (2, 1)), 1 - theta, theta))
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    assert mutual_information(found, "p") == pytest.approx(1 - entropy)


def test_information_of_pure_chance_is_the_known_bias_of_counting():
    rng, repeats = np.random.default_rng(4), 100
    low, high = MODEL.bounds.T
    found = gather(GRID, repeats, lambda theta: rng.uniform(low, high, theta.shape))
    # Twice N ln 2 times the information of independent variables is chi-squared distributed.
    freedom, scale = 9 * 99, 2 * math.log(2) * 1000 * repeats
    for name in VARIED:
        chance = mutual_information(found, name) * scale
        assert chance == pytest.approx(freedom, abs=5 * math.sqrt(2 * freedom))


def test_histograms_hold_every_estimate_once():
    repeats = 20
    low, high = MODEL.bounds.T
    rng = np.random.default_rng(5)
    drawn = []

    def wide(theta):
        drawn.append((theta, rng.uniform(low - 1, high + 1, theta.shape)))
        return drawn[-1][1]

    found = gather(GRID, repeats, wide)
    truth, estimates = (np.concatenate(part) for part in zip(*drawn, strict=True))
    for column, name in enumerate(VARIED, start=1):
        counts, edges = found.histograms[name], found.bin_edges(name)
        assert counts.shape == (10, 100)
        assert (edges[0], edges[-1]) == MODEL.parameters[column].bounds
        np.testing.assert_array_equal(counts.sum(axis=1), 100 * repeats)
        for level, value in enumerate(GRID.axes[name]):
            mine = np.clip(estimates[truth[:, column] == value, column], edges[0], edges[-1])
            np.testing.assert_array_equal(counts[level], np.histogram(mine, edges)[0])


def test_failed_estimates_are_counted_and_left_out_of_the_mean():
    def fails(theta):
        estimates = theta.copy()
        estimates[::4, 1] = np.nan  # one parameter missing: the voxel has no estimate
        estimates[1::4] = np.inf
        estimates[2::4] += 0.5
        estimates[3::4] += 0.1
        return estimates

    found = gather(GRID, 4, fails)
    assert np.all(found.valid == 2)
    np.testing.assert_allclose(found.bias, 0.3)
    np.testing.assert_allclose(found.sd, 0.2)
    assert all(counts.sum() == 2000 for counts in found.histograms.values())


def test_node_without_estimates_is_never_hidden():
    lost = 123

    def fails(theta):
        estimates = theta.copy()
        estimates[np.all(theta == GRID.theta[lost], axis=1)] = np.nan
        return estimates

    found = gather(GRID, 3, fails)
    assert found.valid[lost] == 0
    assert np.all(np.delete(found.valid, lost) == 3)
    for values in (found.mean, found.sd, found.bias, found.rmse):
        assert np.all(np.isnan(values[lost]))
        assert not np.any(np.isnan(np.delete(values, lost, axis=0)))
    assert math.isnan(slope(found, "f"))
    assert math.isnan(summary(found)["Dslow"]["bias"])
    assert np.isnan(marginal(GRID, found.bias, "f").mean).sum() == 1
    with np.errstate(all="raise"):
        nothing = gather(GRID, 2, lambda theta: np.full(theta.shape, np.nan))
    assert np.all(nothing.valid == 0)
    assert math.isnan(mutual_information(nothing, "f"))


def test_same_seed_same_signals_however_the_grid_is_cut():
    grid = Grid.regular(MODEL, points=3)
    whole = next(blocks(grid, NOISE, repeats=7, seed=8))
    assert whole.nodes == slice(0, 27)
    assert whole.signals.shape == (27 * 7, 10)
    for voxels in (1, 20, 100):
        parts = list(blocks(grid, NOISE, repeats=7, seed=8, voxels=voxels))
        assert max(len(part.signals) for part in parts) <= max(voxels, 7)
        assert [n for p in parts for n in range(p.nodes.start, p.nodes.stop)] == list(range(27))
        for field in ("theta", "signals"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, field))
    other = next(blocks(grid, NOISE, repeats=7, seed=9))
    assert not np.any(other.signals == whole.signals)


def test_signals_are_the_noisy_signals_of_their_node():
    grid, sigma, repeats = Grid.regular(MODEL, points=3), 0.05, 400
    clean = MODEL.signal(grid.theta)
    for nodes, theta, signals in blocks(grid, Gaussian(sigma), repeats, voxels=2000):
        np.testing.assert_array_equal(theta, np.repeat(grid.theta[nodes], repeats, axis=0))
        error = signals.reshape(-1, repeats, 10) - clean[nodes, np.newaxis]
        assert np.abs(error.mean(axis=1)).max() < 5 * sigma / math.sqrt(repeats)
        np.testing.assert_allclose(error.std(axis=1), sigma, rtol=5 / math.sqrt(2 * repeats))


def test_noise_differs_between_nodes_and_from_data_of_the_same_seed():
    grid, seed = Grid.regular(MODEL, points=2), 11
    noisy = next(blocks(grid, Gaussian(1.0), 50, seed))
    noise = (noisy.signals - MODEL.signal(noisy.theta)).reshape(8, -1)
    training = np.random.default_rng(seed).standard_normal(500)
    correlation = np.corrcoef(np.vstack([noise, training]))[np.triu_indices(9, k=1)]
    assert np.abs(correlation).max() < 5 / math.sqrt(500)


def test_evaluate_is_what_the_blocks_give():
    grid, noise = Grid.regular(MODEL, points=3), Rician(1 / 30)
    estimator = MaximumLikelihood(MODEL, noise)
    found = evaluate(estimator, grid, noise, repeats=5, seed=6)
    again = evaluate(estimator, grid, noise, repeats=5, seed=6)
    piecewise = GridAccumulator(grid, 5)
    for nodes, _, signals in blocks(grid, noise, 5, seed=6, voxels=30):
        piecewise.add(nodes, estimator.estimate(signals))
    for other in (again, piecewise.statistics()):
        np.testing.assert_allclose(found.mean, other.mean, rtol=1e-9)
        np.testing.assert_allclose(found.sd, other.sd, rtol=1e-6, atol=1e-12)
        np.testing.assert_array_equal(found.valid, other.valid)
    assert np.any(evaluate(estimator, grid, noise, repeats=5, seed=7).mean != found.mean)


def test_columns_go_by_name_not_by_place():
    grid = Grid.regular(MODEL, points=2)
    values = np.array([1.0, 0.3, 1.5, 60.0])
    straight = Estimator(lambda signals: np.tile(values, (len(signals), 1)))
    reversed_ = Estimator(
        lambda signals: np.tile(values[::-1], (len(signals), 1)).astype(np.float32),
        MODEL.names[::-1],
    )
    one, other = (evaluate(e, grid, NOISE, repeats=2) for e in (straight, reversed_))
    np.testing.assert_allclose(one.mean, np.tile(values, (8, 1)))
    np.testing.assert_allclose(other.mean, one.mean, rtol=1e-6)
    tissue = densities(reversed_, MODEL, NOISE, grid.theta[0], repeats=3)
    np.testing.assert_allclose(tissue, np.tile(values, (3, 1)), rtol=1e-6)


def test_densities_agree_with_the_bound():
    theta, noise = [1.0, 0.3, 1.0, 40.0], Gaussian(1e-4)
    found = densities(MaximumLikelihood(MODEL, noise), MODEL, noise, theta, 1000, seed=1)
    assert found.shape == (1000, 4)
    bound = cramer_rao_bound(MODEL, noise, [theta])[0]
    np.testing.assert_allclose(found.var(axis=0) / bound, 1.0, atol=5 * math.sqrt(2 / 1000))
    assert np.all(np.abs(found.mean(axis=0) - theta) < 5 * np.sqrt(bound / 1000))


def test_marginal_averages_over_the_other_axes():
    own = marginal(GRID, GRID.theta, "Dslow")
    for values in (own.levels, own.mean, own.low, own.high):
        np.testing.assert_allclose(values, GRID.axes["Dslow"])
    # Along Dslow, f takes all of its ten levels, each ten times.
    cross = marginal(GRID, GRID.theta, "Dslow", of="f", quantiles=(0, 1))
    np.testing.assert_allclose(cross.mean, 0.3)
    np.testing.assert_allclose(cross.low, 0.1)
    np.testing.assert_allclose(cross.high, 0.5)
    middle = marginal(GRID, GRID.theta, "Dslow", of="f")
    levels = np.repeat(GRID.axes["f"], 10)
    np.testing.assert_allclose(middle.low, np.quantile(levels, 0.1))
    np.testing.assert_allclose(middle.high, np.quantile(levels, 0.9))


def test_slope_of_a_part_of_the_range():
    """Right up to 1.8 um2/ms, and never more than 1.8."""
    found = gather(GRID, 2, lambda theta: np.minimum(theta, [9, 9, 1.8, 999]))
    assert slope(found, "Dslow", within=(0.4, 1.6)) == pytest.approx(1.0)
    # The top third begins exactly at a level: 0.4 + 2.6 * 2 / 3.
    third = 0.4 + 2.6 * 2 / 3
    assert slope(found, "Dslow", within=(third, 3.0)) == pytest.approx(0.0, abs=1e-12)
    assert 0.4 < slope(found, "Dslow") < 0.8
    inside = GRID.axes["Dslow"][6:]
    bump = gather(GRID, 2, lambda theta: theta - 0.1 * np.isclose(theta, inside[0]))
    # Lowering the first of four equally spaced levels by 0.1 steepens the line by 0.03 / step.
    steeper = 1 + 0.03 / (inside[1] - inside[0])
    assert slope(bump, "Dslow", within=(third, 3.0)) == pytest.approx(steeper)
    # A limit one rounding error above a level still means that level.
    rounded = np.nextafter(inside[0], math.inf)
    assert slope(bump, "Dslow", within=(rounded, 3.0)) == pytest.approx(steeper)


def test_mean_map_draws_arrows_from_truth_to_estimate():
    truth, estimate = mean_map(HALFWAY, "Dfast", "f")
    assert truth.shape == estimate.shape == (10, 10, 2)
    np.testing.assert_allclose(truth[2, 7], [GRID.axes["Dfast"][2], GRID.axes["f"][7]])
    np.testing.assert_allclose(estimate, 0.5 * (truth + np.array([80.0, 0.3])))
    across, down = mean_map(HALFWAY, "f", "Dfast")
    np.testing.assert_allclose(across, truth.transpose(1, 0, 2)[..., ::-1])
    np.testing.assert_allclose(down, estimate.transpose(1, 0, 2)[..., ::-1])


def test_mean_map_averages_over_the_rest():
    """An f that is too large by a tenth of Dslow: on average by a tenth of its mean."""
    shift = gather(GRID, 2, lambda theta: theta + [0, 0.1, 0, 0] * theta[:, [2]])
    truth, estimate = mean_map(shift, "f", "Dfast")
    np.testing.assert_allclose(
        estimate - truth, np.broadcast_to([0.17, 0.0], (10, 10, 2)), atol=1e-12
    )


def test_difference_map_shows_who_is_better_where():
    """Always saying the middle wins near the middle; a fixed offset of 0.1 elsewhere."""
    offset = gather(GRID, 2, lambda theta: theta - [0, 0.1, 0, 0])
    shown = difference_map(CONSTANT, offset, "rmse", "f", at={"Dslow": 0.69})
    f = GRID.axes["f"]
    expected = np.broadcast_to((np.abs(f - 0.3) - 0.1)[:, np.newaxis], (10, 10))
    np.testing.assert_allclose(shown, expected, atol=1e-12)
    assert (shown < 0).any() and (shown > 0).any()
    # The bias counts by its size: -0.1 against a bias of the other sign is no win.
    np.testing.assert_allclose(
        difference_map(CONSTANT, offset, "bias", "f", at={"Dslow": 2.71}), expected, atol=1e-12
    )
    np.testing.assert_allclose(
        difference_map(offset, CONSTANT, "sd", "f", at={"f": 0.1}), 0, atol=1e-12
    )


def test_difference_map_takes_the_nearest_level():
    scaled = gather(GRID, 2, lambda theta: 2 * theta)
    for index, value in ((1, 0.69), (8, 2.71), (0, 0.3), (9, 3.1)):
        shown = difference_map(scaled, TRUTH, "bias", "Dslow", at={"Dslow": value})
        np.testing.assert_allclose(shown, GRID.axes["Dslow"][index])
    along = difference_map(scaled, TRUTH, "bias", "f", at={"Dfast": 80})
    np.testing.assert_allclose(along, np.tile(GRID.axes["f"][:, np.newaxis], (1, 10)))


def test_summary_of_a_shrinking_estimator():
    found = summary(HALFWAY)
    assert tuple(found) == VARIED
    for column, name in enumerate(VARIED, start=1):
        low, high = MODEL.training[column]
        # Ten equally spaced levels lie 5/18 of their range from the centre on average.
        bias = 0.5 * (high - low) * 5 / 18
        expected = {"bias": bias, "sd": 0.0, "rmse": bias, "slope": 0.5,
                    "information": math.log2(10)}  # fmt: skip
        assert found[name] == pytest.approx(expected, abs=1e-12)


def test_arrays_round_trip(tmp_path):
    rng = np.random.default_rng(12)

    def noisy(theta):
        estimates = theta * rng.normal(1, 0.1, theta.shape)
        estimates[rng.random(len(theta)) < 0.3] = np.nan
        return estimates

    found = gather(GRID, 6, noisy)
    assert (found.valid == 0).any()  # NaN goes there and back
    np.savez(tmp_path / "statistics.npz", **found.to_arrays())
    with np.load(tmp_path / "statistics.npz", allow_pickle=False) as stored:
        assert sum(array.nbytes for array in stored.values()) < 45_000
        back = GridStatistics.from_arrays(GRID, stored)
    assert back.repeats == 6
    np.testing.assert_array_equal(back.valid, found.valid)
    for name in VARIED:
        np.testing.assert_array_equal(back.histograms[name], found.histograms[name])
        assert mutual_information(back, name) == mutual_information(found, name)
    np.testing.assert_allclose(back.mean, found.mean, rtol=1e-6)
    np.testing.assert_allclose(back.sd, found.sd, rtol=1e-6)


def test_memory_stays_small_at_paper_scale():
    """500,000 signals of ten numbers take 40 MB; far less is held at a time."""
    estimator = Estimator(lambda signals: signals[:, :4].copy())
    evaluate(estimator, Grid.regular(MODEL, points=2), NOISE, repeats=2)
    tracemalloc.start()
    try:
        evaluate(estimator, GRID, NOISE, repeats=500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.parametrize(
    ("axes", "fixed", "message"),
    [
        ({"f": [0.1, 0.2]}, {"S0": 1}, "axes and fixed must together hold each of"),
        ({"f": [0.1, 0.2]}, {"S0": 1, "f": 0.1, "Dslow": 1, "Dfast": 9}, "together hold each"),
        ({"T2": [1, 2], "f": [0.1, 0.2]}, {"S0": 1, "Dslow": 1, "Dfast": 9}, "T2"),
        ({}, {"S0": 1, "f": 0.1, "Dslow": 1, "Dfast": 9}, "axes must hold at least one"),
        ({"f": [0.2, 0.1]}, {"S0": 1, "Dslow": 1, "Dfast": 9}, r"axes\['f'\] .* increasing"),
        ({"f": [0.2, 0.2]}, {"S0": 1, "Dslow": 1, "Dfast": 9}, r"axes\['f'\] .* increasing"),
        ({"f": [0.2]}, {"S0": 1, "Dslow": 1, "Dfast": 9}, "belongs to fixed"),
        ({"f": [0.2, np.nan]}, {"S0": 1, "Dslow": 1, "Dfast": 9}, r"axes\['f'\]"),
        ({"f": [0.2, 0.7]}, {"S0": 1, "Dslow": 1, "Dfast": 9}, "bounds, 0.01 to 0.5"),
        ({"f": [0.1, 0.2]}, {"S0": 1, "Dslow": 5, "Dfast": 9}, r"fixed\['Dslow'\] .* 0.01 to 4"),
        ({"f": [0.1, 0.2]}, {"S0": 1, "Dslow": 1, "Dfast": np.nan}, r"fixed\['Dfast'\]"),
    ],
)
def test_grid_refuses(axes, fixed, message):
    with pytest.raises(ValueError, match=message):
        Grid(MODEL, axes, fixed)


def returns(shape, **kwargs):
    return Estimator(lambda signals: np.ones((len(signals), *shape)), **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Grid.regular(MODEL, points=1), "points must be a whole number, 2 or more"),
        (lambda: evaluate(returns((4,)), GRID, NOISE, repeats=1), "repeats must be .* got 1"),
        (lambda: evaluate(returns((4,)), GRID, NOISE, repeats=2.5), "repeats must be .* got 2.5"),
        (lambda: evaluate(returns((4,)), GRID, NOISE, seed=-1), "seed must be .* got -1"),
        (lambda: evaluate(returns((3,)), GRID, NOISE, 2), r"shape \(2000, 4\).*got \(2000, 3\)"),
        (lambda: evaluate(returns(()), GRID, NOISE, 2), r"shape \(2000, 4\).*got \(2000,\)"),
        (
            lambda: evaluate(Estimator(lambda s: s[:, :4] * 1j), GRID, NOISE, 2),
            "estimates must be real",
        ),
        (
            lambda: evaluate(returns((3,), names=("f", "Dslow", "Dfast")), GRID, NOISE),
            r"model's names, \('S0', .*\), got \('f', 'Dslow', 'Dfast'\)",
        ),
        (
            lambda: evaluate(returns((4,)), GRID, Rician(np.full((1000, 1), 0.1))),
            "one sigma for all nodes.*1000 rows",
        ),
        (lambda: blocks(GRID, NOISE, voxels=0), "voxels must be"),
        (lambda: GridAccumulator(GRID, 2).statistics(), "1000 are missing .* node 0"),
        (lambda: densities(returns((4,)), MODEL, NOISE, [1, 2]), "theta must hold one finite"),
        (
            lambda: densities(returns((4,)), MODEL, NOISE, [1, 0.1, 1, np.nan]),
            "theta must hold one finite",
        ),
        (lambda: densities(returns((4,)), MODEL, NOISE, CENTRE, 1), "repeats must be"),
        (lambda: slope(TRUTH, "S0"), "parameter must vary on the grid.*'S0'"),
        (lambda: slope(TRUTH, "Dslow", within=(1.0, 1.1)), "within must hold two or more levels"),
        (lambda: mutual_information(TRUTH, "T2"), "parameter must vary on the grid.*'T2'"),
        (lambda: TRUTH.bin_edges("S0"), "parameter must vary"),
        (lambda: marginal(GRID, TRUTH.bias[:, 0], "f"), r"values must have shape \(1000, 4\)"),
        (lambda: marginal(GRID, TRUTH.bias, "f", of="T2"), "parameter must be one of.*'T2'"),
        (lambda: marginal(GRID, TRUTH.bias, "f", quantiles=(10, 90)), "quantiles must be"),
        (lambda: mean_map(TRUTH, "f", "f"), "two different parameters"),
        (
            lambda: difference_map(TRUTH, CONSTANT, "mean", "f", {"Dslow": 1}),
            "metric must be one of .* got 'mean'",
        ),
        (lambda: difference_map(TRUTH, CONSTANT, "sd", "f", {}), "all but two of"),
        (lambda: difference_map(TRUTH, CONSTANT, "sd", "f", {"S0": 1}), "all but two of"),
        (
            lambda: difference_map(TRUTH, CONSTANT, "sd", "f", {"Dslow": 3.2}),
            r"at\['Dslow'\] must be within half a step .* 0.4 to 3, got 3.2",
        ),
        (
            lambda: difference_map(
                TRUTH, gather(Grid.regular(MODEL, 3), 2, np.copy), "sd", "f", {"Dslow": 1}
            ),
            "same grid",
        ),
        (
            lambda: GridStatistics.from_arrays(Grid.regular(MODEL, 3), TRUTH.to_arrays()),
            r"arrays\['valid'\] must have shape \(27,\) .* got \(1000,\)",
        ),
        (
            lambda: GridStatistics.from_arrays(GRID, {"repeats": np.array(2)}),
            r"arrays\['valid'\] must have shape .* got nothing",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_node_is_added_once():
    gathered = GridAccumulator(GRID, 2)
    gathered.add(slice(0, 3), np.ones((6, 4)))
    with pytest.raises(ValueError, match="added before"):
        gathered.add(slice(2, 4), np.ones((4, 4)))


class TestRepeatStatistics:
    class Doubling:
        """Estimates twice the first signal and, badly, the second."""

        names = ("a", "b")

        def estimate(self, signals):
            found = np.stack([2 * signals[:, 0].real, signals[:, 1].real], axis=1)
            return np.where(signals[:, :1].real > 50, np.nan, found)

    def test_mean_and_spread_are_those_of_the_noise(self):
        clean = np.array([[1.0 + 1j, 2.0], [3.0, 4.0], [-1.0, 0.0]])
        found = repeat_statistics(self.Doubling(), clean, ComplexGaussian(0.1), 4000, seed=3)
        error = 0.1 / np.sqrt(4000)
        np.testing.assert_allclose(found.mean[:, 0], [2, 6, -2], atol=2 * 4 * error)
        np.testing.assert_allclose(found.mean[:, 1], [2, 4, 0], atol=4 * error)
        np.testing.assert_allclose(found.sd, np.tile([0.2, 0.1], (3, 1)), rtol=0.06)
        assert found.valid.tolist() == [4000] * 3

    def test_a_tissue_meets_the_same_noise_in_any_company(self):
        clean = np.ones((5, 2)) * np.arange(5)[:, np.newaxis]
        noise = Gaussian(0.1)
        together = repeat_statistics(self.Doubling(), clean, noise, 30, seed=1)
        alone = repeat_statistics(self.Doubling(), clean[:2], noise, 30, seed=1)
        np.testing.assert_array_equal(together.mean[:2], alone.mean)

    def test_what_cannot_be_estimated_is_counted(self):
        clean = np.array([[100.0, 1.0], [1.0, 1.0]])
        found = repeat_statistics(self.Doubling(), clean, Gaussian(0.1), 10)
        assert found.valid.tolist() == [0, 10]
        assert np.isnan(found.mean[0]).all() and np.isfinite(found.mean[1]).all()

    @pytest.mark.parametrize(
        ("clean", "repeats", "message"),
        [(np.ones(3), 5, "clean must have shape"), (np.ones((2, 2)), 1, "repeats must be 2")],
    )
    def test_bad_input(self, clean, repeats, message):
        with pytest.raises(ValueError, match=message):
            repeat_statistics(self.Doubling(), clean, Gaussian(0.1), repeats)
