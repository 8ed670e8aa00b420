"""Conventional fitting of fingerprints: nonlinear least squares, many voxels at once.

The simulator is fast only where it has many tissues to do, so all voxels at work are asked
together: one call gives the signals and derivatives of a whole window of voxels, each of which
then takes its own Levenberg-Marquardt step. A voxel that is done gives its place to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from qmri.models import Array
from qmri.mt.model import MTModel

Complex = NDArray[np.complex128]

__all__ = ["NLLS", "NLLSFit", "fit_nlls"]

_WINDOW = 512  # descents at work at once
_ATOMS = 8192  # tissues among which a start is looked for
_BLOCK = 128  # voxels compared with all of them at once: 17 MB
_SEED = 20220
_CANDIDATES = 64  # best atoms among which distinct starts are looked for
_APART = 1.0  # distance of distinct starts: RMS over parameters, in typical spreads

# A step that promises less than this share of the noise's variance is not worth taking: it would
# move no parameter by more than a thousandth of a standard error. Without noise, the rounding of
# the signal is the end.
_TOLERANCE = 1e-6
_ROUNDING = 1e-11
# Two descents closer than this (squared distance in standard errors) head for the same minimum.
_SAME = 1e-3
_FIRST_DAMPING = 1e-2
_FLAT = 1e-10  # curvature that is rounding error, after scaling to a unit diagonal

_M0S, _T1, _T2F, _RX, _T2S, _B0, _B1 = range(7)
# The signal knows m0s and Rx mostly by their product: a valley that is straight in logarithms.
# These are shifted, for both may be 0.
_LOGARITHMIC = [_M0S, _T1, _T2F, _RX]
_SOFT = np.array([0.01, 0.0, 0.0, 1.0])  # 1, s, s, 1/s
_RUNNING, _CONVERGED, _STUCK, _JOINED = 0, 1, 2, 3


@dataclass(frozen=True)
class NLLSFit:
    """Least-squares estimates of many voxels.

    Attributes
    ----------
    theta : (voxels, 7)
        Estimates in the model's units.
    m0 : (voxels,) complex
        Amplitude and phase of the signal, in the unit of the coefficients.
    cost : (voxels,)
        Residual sum of squares over real and imaginary parts, in the squared unit of the
        coefficients.
    converged : (voxels,)
        Whether the iteration ended because no step can lower the cost noticeably.
    at_bound : (voxels, 7) bool
        Where a parameter ended on one of its bounds, and for T2f also where it ended on T1;
        False where both bounds are equal: that parameter is fixed, not caught.
    iterations : (voxels,)
        Steps tried, over all starts.
    """

    theta: Array
    m0: Complex
    cost: Array
    converged: NDArray[np.bool_]
    at_bound: NDArray[np.bool_]
    iterations: NDArray[np.int64]


def fit_nlls(
    model: MTModel,
    coefficients: ArrayLike,
    *,
    start: ArrayLike | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    starts: int = 3,
    max_iterations: int = 200,
    progress: bool = False,
) -> NLLSFit:
    """Tissue whose fingerprint leaves the smallest sum of squares, within bounds.

    Parameters
    ----------
    model : MTModel
    coefficients : (voxels, measurements) complex
        Measured fingerprints: in the model's basis, or pulse by pulse if it has none.
    start : (7,) or (voxels, 7), optional
        Where the only descent begins, within the bounds. Without it, several descents begin from
        the best matches among a few thousand tissues of the model's distribution.
    bounds : mapping of parameter name to (low, high), optional
        Narrower bounds than the model's for the parameters named; ``low == high`` fixes one.
    starts : int
        Number of descents without `start`; the one that ends lowest counts.
    max_iterations : int
        Steps tried per descent before a voxel counts as not converged.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    NLLSFit

    Raises
    ------
    ValueError
        If `coefficients` are real, have the wrong shape, or hold voxels that are zero or not
        finite; a bound is unknown, reversed or outside the model's; `start` lies outside the
        bounds or has T2f > T1; or `starts` or `max_iterations` is below 1.

    Notes
    -----
    M0 is eliminated: for any tissue the best M0 is a projection, and the steps are those of
    variable projection with Kaufman's derivative, which has the exact gradient. T1, T2f and,
    shifted, m0s and Rx are fitted as logarithms. Each step minimises the damped Gauss-Newton
    model of the cost exactly within the bounds and T2f <= T1; damping follows Nielsen's rule
    (Madsen, Nielsen and Tingleff 2004 {cite}`madsen2004leastsquares`). With white noise this is
    maximum likelihood.
    """
    if not isinstance(model, MTModel):
        raise ValueError(f"model must be an MTModel, got {type(model).__name__}")
    coefficients = _check_coefficients(model, coefficients)
    _check_count("starts", starts)
    _check_count("max_iterations", max_iterations)
    limits = _check_bounds(model, bounds)
    usable = _usable(coefficients)
    if not usable.all():
        raise ValueError(
            f"coefficients must be finite and not all zero, got {np.sum(~usable)} of "
            f"{len(usable)} voxels that are not (the first is voxel {np.argmin(usable)})"
        )
    if start is None:
        begin = _starts_from_dictionary(model, coefficients, limits, starts)
    else:
        begin = _check_start(model, limits, start, len(coefficients))[np.newaxis]
    return _fit(model, coefficients, begin, limits, max_iterations, progress)


class NLLS:
    """Nonlinear least squares as an estimator: fingerprints in, tissue out.

    Parameters
    ----------
    model : MTModel
    starts : int
        Descents per voxel, from the best matches among a few thousand tissues.
    bounds : mapping of parameter name to (low, high), optional
        As for :func:`fit_nlls`.
    """

    def __init__(
        self,
        model: MTModel,
        starts: int = 3,
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ):
        if not isinstance(model, MTModel):
            raise ValueError(f"model must be an MTModel, got {type(model).__name__}")
        _check_count("starts", starts)
        _check_bounds(model, bounds)
        self.model, self.starts, self.bounds = model, starts, bounds
        self.names, self.units = model.names, model.units

    def __repr__(self) -> str:
        return f"NLLS({self.model!r}, starts={self.starts})"

    def estimate(self, coefficients: ArrayLike) -> Array:
        """Estimates for each voxel.

        Parameters
        ----------
        coefficients : (voxels, measurements) complex
            Measured fingerprints, as the model makes them.

        Returns
        -------
        (voxels, 7)
            In the model's units; NaN in a voxel that is zero or not finite.

        Raises
        ------
        ValueError
            If `coefficients` are real or have the wrong shape.
        """
        coefficients = _check_coefficients(self.model, coefficients)
        usable = _usable(coefficients)
        theta = np.full((len(coefficients), len(self.names)), np.nan)
        fit = fit_nlls(self.model, coefficients[usable], bounds=self.bounds, starts=self.starts)
        theta[usable] = fit.theta
        return theta


# --- arguments -------------------------------------------------------------------------------


def _check_coefficients(model: MTModel, coefficients: ArrayLike) -> Complex:
    coefficients = np.asarray(coefficients)
    if coefficients.ndim != 2 or coefficients.shape[1] != model.measurements:
        what = "pulse" if model.basis is None else "basis vector"
        raise ValueError(
            f"coefficients must have shape (voxels, {model.measurements}), one column for each "
            f"{what} of the model, got {coefficients.shape}"
        )
    if not np.iscomplexobj(coefficients):
        raise ValueError(
            f"coefficients must be complex, got {coefficients.dtype} values: the phase tells "
            "off-resonance apart"
        )
    return coefficients.astype(np.complex128, copy=False)


def _usable(coefficients: Complex) -> NDArray[np.bool_]:
    return np.isfinite(coefficients).all(axis=1) & np.any(coefficients != 0, axis=1)


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"{name} must be a whole number, 1 or more, got {count!r}")


def _check_bounds(model: MTModel, bounds: Mapping[str, tuple[float, float]] | None) -> Array:
    """Bounds of each parameter, (7, 2), no wider than the model's and with room for T2f <= T1."""
    limits = model.check_bounds(bounds)
    for name, own, (low, high) in zip(model.names, limits, model.bounds, strict=True):
        if own[0] < low or own[1] > high:
            raise ValueError(
                f"bounds[{name!r}] must lie within the model's bounds, {low:g} to {high:g}, "
                f"got {tuple(own.tolist())}"
            )
    if limits[_T2F, 0] > limits[_T1, 1]:
        raise ValueError(
            "bounds must leave room for T2f <= T1, got T2f from "
            f"{limits[_T2F, 0]:g} s and T1 up to {limits[_T1, 1]:g} s"
        )
    return limits


def _check_start(model: MTModel, limits: Array, start: ArrayLike, voxels: int) -> Array:
    start = model.check_start(start, limits, voxels)
    longer = start[:, _T2F] > start[:, _T1]
    if longer.any():
        voxel = np.argmax(longer)
        raise ValueError(
            f"start must have T2f <= T1: voxel {voxel} has T2f = {start[voxel, _T2F]:g} s and "
            f"T1 = {start[voxel, _T1]:g} s"
        )
    return start


# --- where to begin --------------------------------------------------------------------------


def _starts_from_dictionary(
    model: MTModel, coefficients: Complex, limits: Array, starts: int
) -> Array:
    """The best distinct matches for each voxel, (starts, voxels, 7)."""
    voxels = len(coefficients)
    atoms = _atoms(model, limits)
    begin = np.empty((starts, voxels, len(limits)))
    if voxels == 0:
        return begin
    signals = model.signal(atoms)
    signals /= np.linalg.norm(signals, axis=1)[:, np.newaxis]
    places = _inner(atoms)
    spread = places.std(axis=0)
    places /= np.where(spread > 0, spread, 1.0)
    conjugated = signals.conj().T
    candidates = min(len(atoms), max(_CANDIDATES, starts))
    for first in range(0, voxels, _BLOCK):
        correlation = np.abs(coefficients[first : first + _BLOCK] @ conjugated)
        best = np.argpartition(-correlation, candidates - 1, axis=1)[:, :candidates]
        order = np.argsort(-np.take_along_axis(correlation, best, axis=1), axis=1)
        best = np.take_along_axis(best, order, axis=1)
        for row, matches in enumerate(best):
            begin[:, first + row] = atoms[_distinct(matches, places, starts)]
    return begin


def _atoms(model: MTModel, limits: Array) -> Array:
    """Tissue of the model's distribution; what falls outside the bounds is drawn within them."""
    rng = np.random.default_rng(_SEED)
    atoms = model.sample(_ATOMS, rng)
    low, high = limits.T
    first = np.clip(model.training[:, 0], low, high)
    last = np.clip(model.training[:, 1], low, high)
    outside = (atoms < low) | (atoms > high)
    atoms = np.where(outside, rng.uniform(first, last, atoms.shape), atoms)
    # T2f and T1 may have been moved apart from each other.
    atoms[:, _T1] = np.maximum(atoms[:, _T1], limits[_T2F, 0])
    atoms[:, _T2F] = np.minimum(atoms[:, _T2F], atoms[:, _T1])
    return atoms


def _distinct(matches: NDArray, places: Array, starts: int) -> NDArray:
    """The first match, then always the next one that lies apart from all those chosen."""
    chosen = [matches[0]]
    distance = np.full(len(matches), np.inf)
    while len(chosen) < starts:
        difference = places[matches] - places[chosen[-1]]
        distance = np.minimum(distance, np.sqrt(np.mean(difference**2, axis=1)))
        apart = distance >= _APART
        # None that far apart: then the one farthest from all.
        chosen.append(matches[np.argmax(apart) if apart.any() else np.argmax(distance)])
    return np.array(chosen)


# --- the descent -----------------------------------------------------------------------------


def _inner(theta: Array) -> Array:
    """The coordinates that are fitted: logarithms of T1, T2f and, softened, of m0s and Rx."""
    inner = theta.copy()
    inner[:, _LOGARITHMIC] = np.log(theta[:, _LOGARITHMIC] + _SOFT)
    return inner


def _outer(inner: Array, limits: Array, inner_limits: Array) -> Array:
    """Back to parameters; on a bound where the coordinate is."""
    theta = inner.copy()
    theta[:, _LOGARITHMIC] = np.exp(inner[:, _LOGARITHMIC]) - _SOFT
    theta = np.where(inner <= inner_limits[:, 0], limits[:, 0], theta)
    theta = np.where(inner >= inner_limits[:, 1], limits[:, 1], theta)
    theta[:, _T2F] = np.minimum(theta[:, _T2F], theta[:, _T1])
    return theta


class _Slots:
    """State of the descents at work. One that is done gives its slot to the next."""

    def __init__(self, size: int, measurements: int):
        self.descent = np.zeros(size, dtype=np.intp)
        self.measured = np.empty((size, measurements), dtype=np.complex128)
        self.trial = np.empty((size, 7))
        self.place = np.empty((size, 7))
        self.m0 = np.empty(size, dtype=np.complex128)
        self.cost = np.empty(size)
        self.gradient = np.empty((size, 7))
        self.hessian = np.empty((size, 7, 7))
        self.predicted = np.empty(size)
        self.damping = np.empty(size)
        self.growth = np.empty(size)
        self.iterations = np.empty(size, dtype=np.int64)
        self.status = np.empty(size, dtype=np.int8)

    def seat(self, slots: NDArray, descents: NDArray, measured: Complex, begin: Array) -> None:
        """Begin `descents` in `slots`."""
        self.descent[slots] = descents
        self.measured[slots] = measured
        self.trial[slots] = self.place[slots] = begin
        self.cost[slots] = np.inf
        self.predicted[slots] = np.inf
        self.damping[slots] = _FIRST_DAMPING
        self.growth[slots] = 2.0
        self.iterations[slots] = 0
        self.status[slots] = _RUNNING

    def keep(self, slots: NDArray) -> None:
        """Close all other slots."""
        for name, field in vars(self).items():
            setattr(self, name, field[slots])


def _fit(
    model: MTModel,
    coefficients: Complex,
    begin: Array,
    limits: Array,
    max_iterations: int,
    progress: bool,
) -> NLLSFit:
    """All descents of all voxels in one queue, first starts first; the lowest end of each."""
    starts, voxels = begin.shape[:2]
    inner_limits = _inner(limits.T).T
    best = np.full((voxels, 7), np.nan)
    cost = np.full(voxels, np.inf)
    m0 = np.full(voxels, np.nan + 0j)
    converged = np.zeros(voxels, dtype=bool)
    iterations = np.zeros(voxels, dtype=np.int64)
    total = starts * voxels

    def places(descents):
        start, voxel = np.divmod(descents, voxels)
        inner = _inner(begin[start, voxel])
        return np.clip(inner, inner_limits[:, 0], inner_limits[:, 1])

    waiting = min(total, _WINDOW)  # the first descent that has no slot yet
    slots = _Slots(waiting, coefficients.shape[1])
    if waiting:
        first = np.arange(waiting)
        slots.seat(first, first, coefficients[first % voxels], places(first))
    with tqdm(total=total, unit="fit", disable=not progress, desc="NLLS") as bar:
        while len(slots.descent):
            voxel = slots.descent % voxels
            rival = np.where(converged[voxel, np.newaxis], best[voxel], np.nan)
            _advance(model, slots, limits, inner_limits, rival, cost[voxel], max_iterations)
            done = np.flatnonzero(slots.status != _RUNNING)
            if len(done) == 0:
                continue
            bar.update(len(done))
            for slot in done:
                v = voxel[slot]
                iterations[v] += slots.iterations[slot]
                if slots.status[slot] != _JOINED and slots.cost[slot] < cost[v]:
                    best[v], cost[v] = slots.place[slot], slots.cost[slot]
                    m0[v], converged[v] = slots.m0[slot], slots.status[slot] == _CONVERGED
            joining = np.arange(waiting, min(total, waiting + len(done)))
            waiting += len(joining)
            if len(joining):
                slots.seat(
                    done[: len(joining)], joining, coefficients[joining % voxels], places(joining)
                )
            if len(joining) < len(done):
                slots.keep(np.flatnonzero(slots.status == _RUNNING))

    theta = _outer(best, limits, inner_limits)
    low, high = limits.T
    at_bound = (low < high) & ((theta == low) | (theta == high))
    at_bound[:, _T2F] |= (low[_T2F] < high[_T2F]) & (theta[:, _T2F] == theta[:, _T1])
    return NLLSFit(theta, m0, cost, converged, at_bound, iterations)


def _advance(
    model: MTModel,
    slots: _Slots,
    limits: Array,
    inner_limits: Array,
    rival: Array,
    rival_cost: Array,
    max_iterations: int,
) -> None:
    """Judge the trial point of each descent and propose the next one.

    `rival` is where an earlier descent of the same voxel converged, or NaN.
    """
    theta = _outer(slots.trial, limits, inner_limits)
    signal, jacobian = model.signal_and_jacobian(theta)
    jacobian[:, :, _LOGARITHMIC] *= (theta[:, _LOGARITHMIC] + _SOFT)[:, np.newaxis]
    m0, cost, gradient, hessian = _quadratic(slots.measured, signal, jacobian)
    slots.iterations += 1

    better = cost < slots.cost
    # A promise below the rounding of the cost cannot be judged by it.
    power = np.sum(np.abs(slots.measured) ** 2, axis=1)
    vain = ~better & (slots.predicted < 1e-13 * slots.cost + _ROUNDING**2 * power)
    slots.status[vain] = _CONVERGED
    # A start, whose cost so far is infinite, tells nothing about the damping.
    begun = better & np.isfinite(slots.cost)
    quality = (slots.cost[begun] - cost[begun]) / slots.predicted[begun]
    easier = np.maximum(1 / 3, 1 - (2 * np.clip(quality, 0, 1) - 1) ** 3)
    slots.damping[begun] = np.maximum(slots.damping[begun] * easier, 1e-10)
    slots.damping[~better] *= slots.growth[~better]
    slots.growth = np.where(better, 2.0, 2 * slots.growth)
    for field, value in (
        (slots.place, slots.trial), (slots.m0, m0), (slots.cost, cost),
        (slots.gradient, gradient), (slots.hessian, hessian),
    ):  # fmt: skip
        field[better] = value[better]

    unknowns = 2 + np.sum(limits[:, 0] < limits[:, 1])
    variance = slots.cost / max(2 * slots.measured.shape[1] - unknowns, 1)
    worth = _TOLERANCE * variance + _ROUNDING**2 * power
    _conclude(
        slots.place, slots.gradient, slots.hessian, *inner_limits.T, worth, better, slots.status
    )
    distance = slots.place - rival
    near = np.einsum("vp,vpq,vq->v", distance, slots.hessian, distance) < _SAME * variance
    near &= np.abs(slots.cost - rival_cost) < _SAME * variance
    slots.status[(slots.status == _RUNNING) & near] = _JOINED
    tired = (slots.damping > 1e12) | (slots.iterations >= max_iterations)
    slots.status[(slots.status == _RUNNING) & tired] = _STUCK
    _propose(
        slots.place, slots.gradient, slots.hessian, *inner_limits.T, slots.damping, slots.status,
        slots.trial, slots.predicted,
    )  # fmt: skip


def _quadratic(
    measured: Complex, signal: Complex, jacobian: Complex
) -> tuple[Complex, Array, Array, Array]:
    """Best M0, cost, and half of its gradient and of its Gauss-Newton curvature.

    `jacobian` is overwritten.
    """
    power = np.sum(signal.real**2 + signal.imag**2, axis=1)
    m0 = np.sum(signal.conj() * measured, axis=1) / power
    residual = measured - m0[:, np.newaxis] * signal
    cost = np.sum(residual.real**2 + residual.imag**2, axis=1)
    # What a change of M0 could do as well tells nothing about the tissue.
    share = np.einsum("vm,vmp->vp", signal.conj(), jacobian) / power[:, np.newaxis]
    jacobian -= signal[:, :, np.newaxis] * share[:, np.newaxis, :]
    jacobian *= m0[:, np.newaxis, np.newaxis]
    real = np.concatenate([jacobian.real, jacobian.imag], axis=1)
    left = np.concatenate([residual.real, residual.imag], axis=1)
    gradient = -np.einsum("vm,vmp->vp", left, real)
    hessian = real.swapaxes(1, 2) @ real
    return m0, cost, gradient, hessian


@njit(cache=True, error_model="numpy")
def _conclude(place, gradient, hessian, low, high, worth, moved, status):
    """Mark as converged what no undamped step within the bounds could lower by `worth`."""
    step = np.empty(7)
    for v in range(place.shape[0]):
        if status[v] != _RUNNING or not moved[v]:
            continue
        if _step(place[v], gradient[v], hessian[v], low, high, 0.0, step) < worth[v]:
            status[v] = _CONVERGED


@njit(cache=True, error_model="numpy")
def _propose(place, gradient, hessian, low, high, damping, status, trial, predicted):
    """The next trial point of each descent, and the decrease that it promises."""
    step = np.empty(7)
    for v in range(place.shape[0]):
        if status[v] != _RUNNING:
            continue
        predicted[v] = _step(place[v], gradient[v], hessian[v], low, high, damping[v], step)
        for p in range(7):
            # Exactly on a bound, not a rounding error beside it.
            if step[p] == low[p] - place[v, p]:
                trial[v, p] = low[p]
            elif step[p] == high[p] - place[v, p]:
                trial[v, p] = high[p]
            else:
                trial[v, p] = min(max(place[v, p] + step[p], low[p]), high[p])
        if step[2] == step[1] + (place[v, 1] - place[v, 2]):
            trial[v, 2] = trial[v, 1]
        trial[v, 2] = min(trial[v, 2], trial[v, 1])


@njit(cache=True, error_model="numpy")
def _step(place, gradient, hessian, low, high, damping, step):
    """Minimise the damped quadratic model within the bounds and T2f <= T1.

    Returns the decrease of the cost that the model without damping promises.
    """
    n = 7
    scale, g, matrix = np.empty(n), np.empty(n), np.empty((n, n))
    first, last = np.empty(n), np.empty(n)
    for p in range(n):
        scale[p] = np.sqrt(hessian[p, p]) if hessian[p, p] > 0.0 else 1.0
        g[p] = gradient[p]
        first[p], last[p] = low[p] - place[p], high[p] - place[p]
    for p in range(n):
        for q in range(n):
            matrix[p, q] = hessian[p, q]
        matrix[p, p] += (damping + _FLAT) * scale[p] ** 2
    _minimise(g, matrix, first, last, step)
    gap = place[1] - place[2]  # of the logarithms of T1 and T2f: 0 or more
    if step[2] - step[1] > gap:
        # The model is convex: its minimum lies on T2f = T1. T2f closes the gap, and from there
        # on both move as one, the coordinate of T1.
        for p in range(n):
            g[p] += matrix[p, 2] * gap
        g[1] += g[2]
        for p in range(n):
            matrix[1, p] += matrix[2, p]
        for p in range(n):
            matrix[p, 1] += matrix[p, 2]
        for p in range(n):
            matrix[p, 2] = matrix[2, p] = 0.0
        matrix[2, 2] = 1.0
        first[1], last[1] = max(first[1], first[2] - gap), min(last[1], last[2] - gap)
        first[2] = last[2] = g[2] = 0.0
        _minimise(g, matrix, first, last, step)
        step[2] = step[1] + gap
    decrease = 0.0
    for p in range(n):
        bend = 0.0
        for q in range(n):
            bend += hessian[p, q] * step[q]
        decrease -= step[p] * (2.0 * gradient[p] + bend)
    return decrease


@njit(cache=True, error_model="numpy")
def _minimise(gradient, hessian, low, high, step):
    """The step within [low, high] that minimises gradient' s + s' hessian s / 2, exactly.

    Primal active-set method: go towards the minimum over the free coordinates until a bound
    stops one of them; there, let go of the bound that the gradient points away from most.
    """
    n = len(gradient)
    bound = np.zeros(n, dtype=np.bool_)
    matrix, aim = np.empty((n, n)), np.empty(n)
    for p in range(n):
        step[p] = min(max(0.0, low[p]), high[p])
    for p in range(n):
        slope = gradient[p]
        for q in range(n):
            slope += hessian[p, q] * step[q]
        bound[p] = (step[p] <= low[p] and slope >= 0.0) or (step[p] >= high[p] and slope <= 0.0)
    for _ in range(20 * n):  # a few rounds do; more would be rounding errors going in circles
        for p in range(n):
            aim[p] = -gradient[p]
            for q in range(n):
                aim[p] -= hessian[p, q] * step[q]
                matrix[p, q] = 0.0 if bound[p] or bound[q] else hessian[p, q]
            if bound[p]:
                matrix[p, p], aim[p] = 1.0, 0.0
        _solve(matrix, aim)
        length, stopped = 1.0, -1
        for p in range(n):
            if bound[p]:
                continue
            room = (high[p] if aim[p] > 0.0 else low[p]) - step[p]
            if abs(aim[p]) * length > abs(room):
                length, stopped = abs(room / aim[p]), p
        for p in range(n):
            step[p] = min(max(step[p] + length * aim[p], low[p]), high[p])
        if stopped >= 0:
            step[stopped] = high[stopped] if aim[stopped] > 0.0 else low[stopped]
            bound[stopped] = True
            continue
        largest, released = 0.0, -1
        for p in range(n):
            if not bound[p] or low[p] == high[p]:
                continue
            slope = gradient[p]
            for q in range(n):
                slope += hessian[p, q] * step[q]
            inward = -slope if step[p] <= low[p] else slope
            # In units of what rounding leaves of it.
            inward /= np.sqrt(hessian[p, p])
            if inward > largest:
                largest, released = inward, p
        if released < 0:
            return
        bound[released] = False


@njit(cache=True, error_model="numpy")
def _solve(matrix, right):
    """Cholesky solution in place, after scaling to a unit diagonal."""
    n = len(right)
    scale = np.empty(n)
    for p in range(n):
        scale[p] = 1.0 / np.sqrt(matrix[p, p])
    for i in range(n):
        for j in range(i + 1):
            total = matrix[i, j] * scale[i] * scale[j]
            for k in range(j):
                total -= matrix[i, k] * matrix[j, k]
            if i == j:
                matrix[i, i] = np.sqrt(max(total, 1e-15))
            else:
                matrix[i, j] = total / matrix[j, j]
    for i in range(n):
        total = right[i] * scale[i]
        for k in range(i):
            total -= matrix[i, k] * right[k]
        right[i] = total / matrix[i, i]
    for i in range(n - 1, -1, -1):
        total = right[i]
        for k in range(i + 1, n):
            total -= matrix[k, i] * right[k]
        right[i] = total / matrix[i, i]
    for p in range(n):
        right[p] *= scale[p]
