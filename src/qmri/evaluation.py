"""How good is an estimator? Bias, spread and information, tissue by tissue.

An estimator is judged on tissue from a regular grid, each node measured many times with fresh
noise: the test of Epstein et al. {cite}`epstein2024labels`. Anything with the two members of
:class:`qmri.volumes.Estimator` can be judged, whatever is inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from qmri._choices import check_choice
from qmri.models import Array, SignalModel
from qmri.noise import Noise

if TYPE_CHECKING:
    from qmri.volumes import Estimator

__all__ = [
    "Block",
    "Grid",
    "GridAccumulator",
    "GridStatistics",
    "Marginal",
    "RepeatStatistics",
    "blocks",
    "densities",
    "difference_map",
    "evaluate",
    "marginal",
    "mean_map",
    "mutual_information",
    "repeat_statistics",
    "slope",
    "summary",
]

BINS = 100  # of a histogram, over the model's bounds
VOXELS_PER_BLOCK = 50_000  # bounds the memory of an evaluation
# Test noise has random streams of its own: never those of a data set drawn with the same seed.
_STREAM = 1948


@dataclass(frozen=True, eq=False)
class Grid:
    """Tissue on a regular grid: every combination of a few levels of each parameter.

    Parameters
    ----------
    model : SignalModel
    axes : mapping of parameter name to (levels,)
        Increasing values of each parameter that varies, at least two, in the model's units.
    fixed : mapping of parameter name to float
        Value of each parameter that does not vary.

    Raises
    ------
    ValueError
        If a parameter of the model is missing, doubled or unknown, no parameter varies, or
        values are not finite, not increasing or outside the model's bounds.
    """

    model: SignalModel
    axes: Mapping[str, Array]
    fixed: Mapping[str, float]

    def __post_init__(self):
        names = self.model.names
        if sorted([*self.axes, *self.fixed]) != sorted(names):
            raise ValueError(
                f"axes and fixed must together hold each of {names} once, got axes "
                f"{tuple(self.axes)} and fixed {tuple(self.fixed)}"
            )
        if not self.axes:
            raise ValueError("axes must hold at least one parameter, got none")
        axes, fixed = {}, {}
        for parameter in self.model.parameters:
            name = parameter.name
            if name in self.axes:
                values = axes[name] = np.array(self.axes[name], dtype=np.float64)
                if values.ndim != 1 or values.size < 2 or not np.all(np.diff(values) > 0):
                    raise ValueError(
                        f"axes[{name!r}] must hold two or more increasing values (a parameter "
                        f"with one value belongs to fixed), got {self.axes[name]!r}"
                    )
                values.flags.writeable = False
            else:
                values = fixed[name] = float(self.fixed[name])
            low, high = parameter.bounds
            if not np.all((low <= values) & (values <= high)):
                where = "axes" if name in self.axes else "fixed"
                raise ValueError(
                    f"{where}[{name!r}] must be within the model's bounds, {low:g} to {high:g}, "
                    f"got {values}"
                )
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "fixed", fixed)

    @classmethod
    def regular(
        cls, model: SignalModel, points: int = 10, fixed: Mapping[str, float] | None = None
    ) -> Grid:
        """Equally spaced levels over the training ranges, both ends included.

        Parameters
        ----------
        model : SignalModel
        points : int
            Levels of each parameter that is not fixed.
        fixed : mapping of parameter name to float, optional
            By default the model's amplitude, if it has one, is 1.
        """
        _check_whole("points", points, 2)
        if fixed is None:
            fixed = {} if model.amplitude is None else {model.amplitude: 1.0}
        varied = [p for p in model.parameters if p.name not in fixed]
        return cls(model, {p.name: np.linspace(*p.training, points) for p in varied}, fixed)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of levels along each axis."""
        return tuple(len(levels) for levels in self.axes.values())

    @cached_property
    def theta(self) -> Array:
        """Parameters of each node, (nodes, parameters); the last axis runs fastest."""
        levels = iter(np.meshgrid(*self.axes.values(), indexing="ij"))
        theta = np.empty((*self.shape, len(self.model.names)))
        for p, name in enumerate(self.model.names):
            theta[..., p] = next(levels) if name in self.axes else self.fixed[name]
        theta = theta.reshape(-1, len(self.model.names))
        theta.flags.writeable = False
        return theta

    def __len__(self) -> int:
        """Number of nodes."""
        return int(np.prod(self.shape))

    def _column(self, name: str) -> int:
        check_choice("parameter", name, self.model.names)
        return self.model.names.index(name)

    def _axis(self, name: str) -> int:
        if name not in self.axes:
            raise ValueError(
                f"parameter must vary on the grid, one of {(*self.axes,)}, got {name!r}"
            )
        return list(self.axes).index(name)

    def _same_as(self, other: Grid) -> bool:
        same_names = self.model.names == other.model.names and self.shape == other.shape
        return same_names and np.array_equal(self.theta, other.theta)


@dataclass(frozen=True, eq=False)
class GridStatistics:
    """What an estimator does at each node of a grid.

    Attributes
    ----------
    grid : Grid
    repeats : int
        Noisy signals of each node.
    mean, sd : (nodes, parameters)
        Mean of the estimates and their standard deviation (divided by the number of estimates,
        so that rmse^2 = bias^2 + sd^2), in the model's units; NaN at a node without estimates.
    valid : (nodes,)
        How many of the repeats could be estimated: all parameters finite.
    histograms : mapping of parameter name to (levels, bins)
        For each parameter that varies, how many estimates of a true level fall in each of the
        bins of :meth:`bin_edges`, over all values of the other parameters. Estimates outside the
        model's bounds count in the first or the last bin.
    """

    grid: Grid
    repeats: int
    mean: Array
    sd: Array
    valid: NDArray[np.int64]
    histograms: Mapping[str, NDArray[np.int64]]

    @property
    def bias(self) -> Array:
        """Mean estimate minus truth, (nodes, parameters), in the model's units."""
        return self.mean - self.grid.theta

    @property
    def rmse(self) -> Array:
        """Root mean squared error, (nodes, parameters), in the model's units."""
        return np.hypot(self.bias, self.sd)

    def bin_edges(self, parameter: str) -> Array:
        """Edges of the histogram of a parameter, (bins + 1,): equal bins over its bounds."""
        self.grid._axis(parameter)
        low, high = self.grid.model.bounds[self.grid._column(parameter)]
        return np.linspace(low, high, self.histograms[parameter].shape[1] + 1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All but the grid as a few small arrays: single precision, shortest unsigned integers."""
        arrays = {
            "repeats": _shortest(np.array(self.repeats)),
            "valid": _shortest(self.valid),
            "mean": self.mean.astype(np.float32),
            "sd": self.sd.astype(np.float32),
        }
        for name, counts in self.histograms.items():
            arrays[f"histogram_{name}"] = _shortest(counts)
        return arrays

    @classmethod
    def from_arrays(cls, grid: Grid, arrays: Mapping[str, np.ndarray]) -> GridStatistics:
        """What :meth:`to_arrays` has stored, for the same grid.

        Raises
        ------
        ValueError
            If an array is missing or does not have the shape that `grid` asks for.
        """
        nodes, parameters = grid.theta.shape
        shapes = {"repeats": (), "valid": (nodes,)}
        shapes |= dict.fromkeys(("mean", "sd"), (nodes, parameters))
        shapes |= {f"histogram_{n}": (len(levels), BINS) for n, levels in grid.axes.items()}
        for name, shape in shapes.items():
            found = np.shape(arrays[name]) if name in arrays else "nothing"
            if found != shape:
                raise ValueError(
                    f"arrays[{name!r}] must have shape {shape} for this grid of {nodes} nodes, "
                    f"got {found}"
                )
        return cls(
            grid,
            int(arrays["repeats"]),
            np.asarray(arrays["mean"], dtype=np.float64),
            np.asarray(arrays["sd"], dtype=np.float64),
            np.asarray(arrays["valid"], dtype=np.int64),
            {n: np.asarray(arrays[f"histogram_{n}"], dtype=np.int64) for n in grid.axes},
        )


def _shortest(counts: NDArray) -> NDArray:
    return counts.astype(np.min_scalar_type(int(counts.max())))


# --- evaluation ------------------------------------------------------------------------------


class Block(NamedTuple):
    """Noisy signals of some neighbouring nodes.

    Attributes
    ----------
    nodes : slice
        Which nodes of the grid.
    theta : (nodes * repeats, parameters)
        True parameters of each signal; the repeats of a node follow each other.
    signals : (nodes * repeats, measurements)
    """

    nodes: slice
    theta: Array
    signals: Array


def blocks(
    grid: Grid,
    noise: Noise,
    repeats: int = 500,
    seed: int = 0,
    *,
    voxels: int = VOXELS_PER_BLOCK,
) -> Iterator[Block]:
    """The noisy signals of a grid, a few nodes at a time.

    The noise of a node depends on the seed and the number of the node alone: every estimator
    meets the same noise, however the grid is cut.

    Parameters
    ----------
    grid : Grid
    noise : Noise
        With one sigma for all nodes.
    repeats : int
        Noisy signals of each node, two or more.
    seed : int
        Of the noise, 0 or more.
    voxels : int
        Largest number of signals in a block, unless the repeats of one node are more.

    Yields
    ------
    Block

    Raises
    ------
    ValueError
        If `repeats`, `seed` or `voxels` is too small, or `noise` has a sigma for each voxel.
    """
    _check_whole("repeats", repeats, 2)
    _check_whole("seed", seed, 0)
    _check_noise(noise)
    _check_whole("voxels", voxels, 1)
    return _blocks(grid, noise, repeats, seed, max(1, voxels // repeats))


def _blocks(grid: Grid, noise: Noise, repeats: int, seed: int, size: int) -> Iterator[Block]:
    clean = grid.model.signal(grid.theta)
    for first in range(0, len(grid), size):
        nodes = slice(first, min(first + size, len(grid)))
        signals = np.empty((nodes.stop - first, repeats, clean.shape[1]))
        for node in range(first, nodes.stop):
            same = np.broadcast_to(clean[node], signals.shape[1:])
            signals[node - first] = noise.sample(same, _generator(seed, node))
        theta = np.repeat(grid.theta[nodes], repeats, axis=0)
        yield Block(nodes, theta, signals.reshape(-1, clean.shape[1]))


def _generator(seed: int, node: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM, node)))


class GridAccumulator:
    """Gathers the estimates of a grid, block by block, into statistics.

    Parameters
    ----------
    grid : Grid
    repeats : int
        Estimates of each node, two or more.

    Examples
    --------
    >>> from qmri import IVIM, Rician, fit_mle
    >>> model, noise = IVIM([0, 20, 50, 200, 800]), Rician(1 / 50)
    >>> grid = Grid.regular(model, points=2)
    >>> found = GridAccumulator(grid, repeats=10)
    >>> for nodes, theta, signals in blocks(grid, noise, repeats=10):
    ...     found.add(nodes, fit_mle(model, noise, signals, start=theta).theta)
    >>> found.statistics().mean.shape
    (8, 4)
    """

    def __init__(self, grid: Grid, repeats: int):
        _check_whole("repeats", repeats, 2)
        self.grid, self.repeats = grid, repeats
        self._mean = np.full(grid.theta.shape, np.nan)
        self._sd = np.full(grid.theta.shape, np.nan)
        self._valid = np.zeros(len(grid), dtype=np.int64)
        self._histograms = {n: np.zeros((len(v), BINS), np.int64) for n, v in grid.axes.items()}
        self._added = np.zeros(len(grid), dtype=bool)

    def add(self, nodes: slice, estimates: ArrayLike) -> None:
        """Take in the estimates of some nodes.

        Parameters
        ----------
        nodes : slice
        estimates : (nodes * repeats, parameters)
            In the order of a block's signals and of the model's parameters. A row with a value
            that is not finite counts as one that could not be estimated.

        Raises
        ------
        ValueError
            If `estimates` has the wrong shape or is complex, or a node has been added before.
        """
        truth = self.grid.theta[nodes]
        if self._added[nodes].any():
            raise ValueError(f"nodes must not have been added before, got {nodes}")
        expected = (len(truth) * self.repeats, truth.shape[1])
        estimates = _check_estimates(estimates, expected).reshape(len(truth), self.repeats, -1)
        found = np.isfinite(estimates).all(axis=2)
        valid = found.sum(axis=1)
        # About the truth, not about zero: no digits are lost to the size of the parameter.
        error = np.where(found[:, :, np.newaxis], estimates - truth[:, np.newaxis], 0.0)
        with np.errstate(invalid="ignore"):  # 0 / 0 at a node without estimates
            bias = error.sum(axis=1) / valid[:, np.newaxis]
            error -= bias[:, np.newaxis]
            error[~found] = 0.0
            variance = np.einsum("nrp,nrp->np", error, error) / valid[:, np.newaxis]
        self._mean[nodes], self._sd[nodes] = truth + bias, np.sqrt(variance)
        self._valid[nodes] = valid
        levels = np.unravel_index(np.arange(len(self.grid))[nodes], self.grid.shape)
        for (name, counts), level in zip(self._histograms.items(), levels, strict=True):
            column = self.grid._column(name)
            low, high = self.grid.model.bounds[column]
            scaled = (estimates[:, :, column] - low) * (BINS / (high - low))
            bins = np.clip(scaled[found], 0, BINS - 1).astype(np.intp)
            cells = bins + BINS * np.repeat(level, valid)
            counts += np.bincount(cells, minlength=counts.size).reshape(counts.shape)
        self._added[nodes] = True

    def statistics(self) -> GridStatistics:
        """Statistics of the whole grid.

        Raises
        ------
        ValueError
            If the estimates of a node are missing.
        """
        if not self._added.all():
            raise ValueError(
                f"all {len(self.grid)} nodes must have been added, "
                f"{np.sum(~self._added)} are missing (the first is node {np.argmin(self._added)})"
            )
        return GridStatistics(
            self.grid, self.repeats, self._mean, self._sd, self._valid, self._histograms
        )


def evaluate(
    estimator: Estimator,
    grid: Grid,
    noise: Noise,
    repeats: int = 500,
    seed: int = 0,
    *,
    progress: bool = False,
) -> GridStatistics:
    """Bias, spread and histograms of an estimator at each node of a grid.

    Parameters
    ----------
    estimator : Estimator
        Its names are those of the model's parameters, in any order.
    grid : Grid
    noise : Noise
        With one sigma for all nodes.
    repeats : int
        Noisy signals of each node, two or more.
    seed : int
        Of the noise: the same seed shows every estimator the same signals.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    GridStatistics
        Signals that could not be estimated are left out of the means and missing in `valid`.

    Raises
    ------
    ValueError
        If the estimator's names are not the model's or its estimates have the wrong shape, or
        `repeats`, `seed` or `noise` is not as for :func:`blocks`.

    References
    ----------
    Epstein et al. 2024 {cite}`epstein2024labels`: 500 repeats on a grid of 10 x 10 x 10.
    """
    columns = _columns(estimator, grid.model)
    gathered = GridAccumulator(grid, repeats)
    with tqdm(total=len(grid), unit="node", disable=not progress, desc="Evaluation") as bar:
        for nodes, _, signals in blocks(grid, noise, repeats, seed):
            gathered.add(nodes, _estimates(estimator, signals, columns))
            bar.update(nodes.stop - nodes.start)
    return gathered.statistics()


@dataclass(frozen=True, eq=False)
class RepeatStatistics:
    """Mean and spread of the estimates of each tissue over repeats of the noise.

    Attributes
    ----------
    mean, sd : (tissues, parameters)
        NaN where no signal could be estimated. The square of `sd` is the mean squared
        deviation, so that mean squared error = bias^2 + sd^2 exactly.
    valid : (tissues,)
        Number of signals that could be estimated.
    """

    mean: Array
    sd: Array
    valid: NDArray[np.int64]


def repeat_statistics(
    estimator: Estimator, clean: ArrayLike, noise: Noise, repeats: int, seed: int = 0
) -> RepeatStatistics:
    """Bias and spread where tissue does not lie on a grid.

    Parameters
    ----------
    estimator : Estimator
    clean : (tissues, measurements)
        Noise-free signals, real or complex.
    noise : Noise
        With one sigma for all.
    repeats : int
        Noisy signals of each tissue, two or more.
    seed : int
        The noise of tissue i follows from (seed, i): the same for every estimator.

    Returns
    -------
    RepeatStatistics

    Raises
    ------
    ValueError
        If `clean` does not have two axes, or there are fewer than two repeats.
    """
    clean = np.asarray(clean)
    if clean.ndim != 2:
        raise ValueError(f"clean must have shape (tissues, measurements), got {clean.shape}")
    if repeats < 2:
        raise ValueError(f"repeats must be 2 or more, got {repeats!r}")
    shape = (len(clean), len(estimator.names))
    mean, sd = np.full(shape, np.nan), np.full(shape, np.nan)
    valid = np.zeros(len(clean), dtype=np.int64)
    rows = max(1, VOXELS_PER_BLOCK // repeats)
    for first in range(0, len(clean), rows):
        part = slice(first, min(first + rows, len(clean)))
        signals = [
            noise.sample(np.tile(clean[i], (repeats, 1)), np.random.default_rng([_STREAM, seed, i]))
            for i in range(part.start, part.stop)
        ]
        estimates = np.asarray(estimator.estimate(np.concatenate(signals)), dtype=np.float64)
        estimates = estimates.reshape(len(signals), repeats, shape[1])
        usable = np.isfinite(estimates).all(axis=2)
        valid[part] = usable.sum(axis=1)
        count = np.where(valid[part] > 0, valid[part], np.nan)[:, np.newaxis]
        kept = np.where(usable[:, :, np.newaxis], estimates, 0.0)
        mean[part] = kept.sum(axis=1) / count
        away = np.where(usable[:, :, np.newaxis], kept - mean[part][:, np.newaxis], 0.0)
        sd[part] = np.sqrt((away**2).sum(axis=1) / count)
    return RepeatStatistics(mean, sd, valid)


def densities(
    estimator: Estimator,
    model: SignalModel,
    noise: Noise,
    theta: ArrayLike,
    repeats: int = 500,
    seed: int = 0,
) -> Array:
    """Estimates of one tissue measured many times: nothing is averaged.

    Parameters
    ----------
    estimator : Estimator
        Its names are those of the model's parameters, in any order.
    model : SignalModel
    noise : Noise
    theta : (parameters,)
        The tissue, in the model's units.
    repeats : int
        Noisy signals, two or more.
    seed : int
        Of the noise, 0 or more.

    Returns
    -------
    (repeats, parameters)
        In the model's order and units; NaN where a signal could not be estimated.

    Raises
    ------
    ValueError
        If `theta` does not hold one finite number for each parameter, or another argument is not
        as for :func:`evaluate`.
    """
    _check_whole("repeats", repeats, 2)
    _check_whole("seed", seed, 0)
    _check_noise(noise)
    columns = _columns(estimator, model)
    tissue = np.asarray(theta, dtype=np.float64)
    if tissue.shape != (len(model.names),) or not np.all(np.isfinite(tissue)):
        raise ValueError(
            f"theta must hold one finite number for each of {model.names}, got {theta}"
        )
    clean = np.broadcast_to(model.signal(tissue[np.newaxis]), (repeats, model.measurements))
    return _estimates(estimator, noise.sample(clean, _generator(seed, 0)), columns)


def _columns(estimator: Estimator, model: SignalModel) -> list[int]:
    names = tuple(estimator.names)
    if sorted(names) != sorted(model.names):
        raise ValueError(f"estimator must have the model's names, {model.names}, got {names}")
    return [names.index(name) for name in model.names]


def _estimates(estimator: Estimator, signals: Array, columns: list[int]) -> Array:
    """Checked estimates in the model's order."""
    return _check_estimates(estimator.estimate(signals), (len(signals), len(columns)))[:, columns]


def _check_estimates(estimates: ArrayLike, expected: tuple[int, int]) -> Array:
    estimates = np.asarray(estimates)
    if estimates.shape != expected:
        raise ValueError(
            f"estimates must have shape {expected}, one row for each signal and one column for "
            f"each parameter, got {estimates.shape}"
        )
    if np.iscomplexobj(estimates):
        raise ValueError("estimates must be real, got complex values")
    return estimates.astype(np.float64, copy=False)


def _check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")


def _check_noise(noise: Noise) -> None:
    if np.ndim(noise.sigma) == 2 and len(noise.sigma) > 1:
        raise ValueError(
            "noise must have one sigma for all nodes, a number or one for each measurement, "
            f"got {len(noise.sigma)} rows"
        )


# --- what the statistics say -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Marginal:
    """A quantity by one parameter, over all values of the others.

    Attributes
    ----------
    levels : (levels,)
        True values of the parameter, in its unit.
    mean : (levels,)
        Mean over the nodes of a level.
    low, high : (levels,)
        Quantiles over the nodes of a level.
    """

    levels: Array
    mean: Array
    low: Array
    high: Array


def marginal(
    grid: Grid,
    values: ArrayLike,
    parameter: str,
    of: str | None = None,
    quantiles: tuple[float, float] = (0.1, 0.9),
) -> Marginal:
    """How a quantity depends on one parameter, with its spread over the others.

    Parameters
    ----------
    grid : Grid
    values : (nodes, parameters)
        e.g. ``statistics.bias``.
    parameter : str
        The parameter along the axis, one that varies.
    of : str, optional
        Whose column of `values`; by default that of `parameter`.
    quantiles : (low, high)
        From 0, the smallest of a level's nodes, to 1, the largest.

    Returns
    -------
    Marginal
        NaN at a level where a node has NaN.

    Raises
    ------
    ValueError
        If a name is unknown, `values` has another shape or `quantiles` are not in order.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != grid.theta.shape:
        raise ValueError(
            f"values must have shape {grid.theta.shape}, (nodes, parameters), got {values.shape}"
        )
    low, high = quantiles
    if not 0 <= low <= high <= 1:
        raise ValueError(f"quantiles must be two numbers in order, 0 to 1, got {quantiles!r}")
    axis, column = grid._axis(parameter), grid._column(of or parameter)
    by_level = np.moveaxis(values[:, column].reshape(grid.shape), axis, 0)
    by_level = by_level.reshape(grid.shape[axis], -1)
    low, high = np.quantile(by_level, (low, high), axis=1)
    return Marginal(grid.axes[parameter], by_level.mean(axis=1), low, high)


def slope(
    statistics: GridStatistics, parameter: str, within: tuple[float, float] | None = None
) -> float:
    """Least-squares slope of the mean estimate on the truth, over the nodes of a grid.

    1 where the estimates keep the scale of the truth; less where they are compressed; 0 where
    the estimate does not follow the truth at all.

    Parameters
    ----------
    statistics : GridStatistics
    parameter : str
        One that varies.
    within : (low, high), optional
        Only nodes with a true value from `low` to `high`, both included.

    Returns
    -------
    float
        NaN if a node has no estimates: none is left out.

    Raises
    ------
    ValueError
        If the parameter does not vary or `within` holds fewer than two of its levels.
    """
    grid = statistics.grid
    grid._axis(parameter)
    levels, column = grid.axes[parameter], grid._column(parameter)
    truth, estimate = grid.theta[:, column], statistics.mean[:, column]
    if within is not None:
        low, high = within
        rounding = 1e-9 * (levels[-1] - levels[0])  # levels are rarely round numbers
        inside = (truth >= low - rounding) & (truth <= high + rounding)
        if len(np.unique(truth[inside])) < 2:
            raise ValueError(
                f"within must hold two or more levels of {parameter!r}, {levels}, got {within!r}"
            )
        truth, estimate = truth[inside], estimate[inside]
    centred = truth - truth.mean()
    return float(np.sum(centred * estimate) / np.sum(centred**2))


def mutual_information(statistics: GridStatistics, parameter: str) -> float:
    """How much an estimate tells about the true level of a parameter, in bits.

    All levels are equally likely, the other parameters unknown. The most it can be is the
    logarithm of the number of levels to base 2: 3.3 bits for ten. It does not change if the
    estimates are shifted, stretched or swapped one for one: it asks what could be learnt from
    them, not whether they are right.

    Parameters
    ----------
    statistics : GridStatistics
    parameter : str
        One that varies.

    Returns
    -------
    float
        0 for an estimate that does not depend on the parameter; NaN if a level has no estimates.

    Notes
    -----
    From the counts of the histogram as they are. Chance alone makes it too large, by about
    (levels - 1) (bins - 1) / (2 ln 2) bits divided by the number of estimates: 0.0013 bits for
    ten levels, 100 bins and 500,000 estimates.
    """
    statistics.grid._axis(parameter)
    counts = statistics.histograms[parameter]
    with np.errstate(divide="ignore", invalid="ignore"):
        given_level = counts / counts.sum(axis=1, keepdims=True)
        surprise = given_level * np.log2(given_level / given_level.mean(axis=0))
    surprise[counts == 0] = 0.0
    return float(surprise.sum(axis=1).mean()) if counts.sum(axis=1).all() else float("nan")


def mean_map(statistics: GridStatistics, x: str, y: str) -> tuple[Array, Array]:
    """True and mean estimated values of two parameters: tails and tips of arrows.

    Parameters
    ----------
    statistics : GridStatistics
    x, y : str
        Two different parameters that vary.

    Returns
    -------
    truth, estimate : (levels of x, levels of y, 2)
        Averaged over the other parameters; x first, y second, in their units.

    Raises
    ------
    ValueError
        If a parameter does not vary, or both are the same.
    """
    grid = statistics.grid
    axes = [grid._axis(x), grid._axis(y)]
    if x == y:
        raise ValueError(f"x and y must be two different parameters, got {x!r} twice")
    columns = [grid._column(x), grid._column(y)]
    truth, estimate = (
        np.moveaxis(values[:, columns].reshape(*grid.shape, 2), axes, (0, 1))
        .reshape(grid.shape[axes[0]], grid.shape[axes[1]], -1, 2)
        .mean(axis=2)
        for values in (grid.theta, statistics.mean)
    )
    return truth, estimate


_METRICS = ("bias", "sd", "rmse")


def difference_map(
    first: GridStatistics,
    second: GridStatistics,
    metric: str,
    parameter: str,
    at: Mapping[str, float],
) -> Array:
    """Where one estimator of a parameter is better than another: negative where `first` is.

    Parameters
    ----------
    first, second : GridStatistics
        On the same grid.
    metric : {"bias", "sd", "rmse"}
        Errors to subtract; of the bias the magnitude.
    parameter : str
        Whose errors.
    at : mapping of parameter name to float
        True value, to the nearest level, of all but two of the parameters that vary.

    Returns
    -------
    (levels, levels)
        `first` minus `second`, in the unit of `parameter`; the two axes that are left, in the
        order of the grid.

    Raises
    ------
    ValueError
        If the grids differ, a name is unknown, `at` does not leave two axes, or a value lies
        more than half a step outside the levels.
    """
    grid = first.grid
    if not grid._same_as(second.grid):
        raise ValueError("first and second must be on the same grid, got two different ones")
    check_choice("metric", metric, _METRICS)
    column = grid._column(parameter)
    if not set(at) <= set(grid.axes) or len(at) != len(grid.axes) - 2:
        raise ValueError(
            f"at must hold a value for all but two of {tuple(grid.axes)}, got {dict(at)!r}"
        )
    where = tuple(
        _nearest(name, levels, at[name]) if name in at else slice(None)
        for name, levels in grid.axes.items()
    )
    one, other = (np.abs(getattr(s, metric)[:, column]) for s in (first, second))
    return (one - other).reshape(grid.shape)[where]


def _nearest(name: str, levels: Array, value: float) -> int:
    half = 0.5 * np.diff(levels)
    if not levels[0] - half[0] <= value <= levels[-1] + half[-1]:
        raise ValueError(
            f"at[{name!r}] must be within half a step of the levels, {levels[0]:g} to "
            f"{levels[-1]:g}, got {value!r}"
        )
    return int(np.argmin(np.abs(levels - value)))


def summary(statistics: GridStatistics) -> dict[str, dict[str, float]]:
    """A few numbers for each parameter that varies.

    Parameters
    ----------
    statistics : GridStatistics

    Returns
    -------
    dict of parameter name to dict
        "bias", "sd" and "rmse": mean over the nodes of the magnitude of the bias, of the standard
        deviation and of the root mean squared error, in the parameter's unit; "slope":
        :func:`slope`; "information": :func:`mutual_information`, in bits. All but the
        information are NaN if a node has no estimates; `statistics.valid` says which.
    """
    numbers = {}
    for name in statistics.grid.axes:
        column = statistics.grid._column(name)
        numbers[name] = {
            metric: float(np.mean(np.abs(getattr(statistics, metric)[:, column])))
            for metric in _METRICS
        }
        numbers[name]["slope"] = slope(statistics, name)
        numbers[name]["information"] = mutual_information(statistics, name)
    return numbers
