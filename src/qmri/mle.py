"""Maximum likelihood, for every voxel of a slice at once.

The solver is a Levenberg-Marquardt iteration with bounds that advances all voxels together: the
model and the noise are each asked once per iteration, for all voxels still at work, and a
compiled kernel takes one step in each. Any `SignalModel` and any `Noise` therefore fit, and
those that are compiled fit fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from qmri.models import Array, SignalModel
from qmri.noise import Noise

__all__ = ["Fit", "MaximumLikelihood", "fit_mle"]

_CHUNK = 131_072  # voxels whose state is held at once
_WINDOW = 2048  # voxels at work at once: large enough for all cores, small enough for caches

_RUNNING, _CONVERGED, _STUCK, _JOINED = 0, 1, 2, 3

# A step that promises less than this many nats is not worth taking: a hundred-millionth of what one
# standard error of a parameter costs.
_TOLERANCE = 1e-8
# Two descents whose values (in nats) and squared distance (in standard errors) differ by less
# than this are taken to head for the same minimum.
_SAME = 1e-3
_FIRST_DAMPING = 0.1


@dataclass(frozen=True)
class Fit:
    """Maximum-likelihood estimates of many voxels.

    Attributes
    ----------
    theta : (voxels, parameters)
        Estimates in the model's units; NaN in a voxel that could not be fitted.
    nll : (voxels,)
        Negative log-likelihood at `theta`, in nats; NaN in a voxel that could not be fitted,
        ``inf`` in one that holds a Rician magnitude of exactly 0, whose density is 0 whatever
        the tissue (its estimates are sound: they rest on the ratio of likelihoods).
    bound_hit : (voxels, parameters)
        -1 where a parameter ended on its lower bound, +1 on its upper bound, else 0 (also where
        both bounds are equal: that parameter is fixed, not caught).
    converged : (voxels,)
        Whether the iteration ended because no step can lower `nll` further.
    iterations : (voxels,)
        Steps tried, over all starts.
    """

    theta: Array
    nll: Array
    bound_hit: NDArray[np.int8]
    converged: NDArray[np.bool_]
    iterations: NDArray[np.int64]

    @property
    def at_bound(self) -> NDArray[np.bool_]:
        """Whether any parameter ended on a bound, (voxels,)."""
        return np.any(self.bound_hit != 0, axis=1)


def fit_mle(
    model: SignalModel,
    noise: Noise,
    signals: ArrayLike,
    start: ArrayLike | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    *,
    max_iterations: int = 300,
    progress: bool = False,
) -> Fit:
    """Parameters that make each measured signal most likely, within bounds.

    Parameters
    ----------
    model : SignalModel
        Physics, with its parameters' bounds.
    noise : Noise
        Noise model, with its standard deviation.
    signals : (voxels, measurements)
        Measured signals, real.
    start : (voxels, parameters) or (parameters,), optional
        Where the iteration begins, within the bounds. The model proposes further starts for each
        voxel from the data; where two descents end in different places or on a bound more are
        made, and the likeliest end wins. Without `start` they all begin from the data.
    bounds : mapping of parameter name to (low, high), optional
        Replaces the model's bounds for the parameters named; ``low == high`` fixes one.
    max_iterations : int
        Steps tried per start before a voxel counts as not converged.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    Fit
        A voxel whose signal is impossible under `noise` (NaN, infinite, or a negative
        magnitude), or whose model signal is not finite at the start, has NaN estimates and
        ``converged == False``; its neighbours are not affected.

    Raises
    ------
    ValueError
        If a shape is wrong, `signals` is complex, a bound is unknown or reversed, or `start`
        lies outside the bounds or is not finite.

    Notes
    -----
    Each step minimises a quadratic model of the negative log-likelihood within the bounds: its
    gradient is exact, its curvature J' W J with W the Fisher information of one measurement
    (Fisher scoring). Damping follows Nielsen's rule (Madsen, Nielsen and Tingleff 2004
    {cite}`madsen2004leastsquares`): steps that raise the negative log-likelihood are never
    taken.
    """
    signals = _check_signals(model, signals)
    limits = model.check_bounds(bounds)
    start = None if start is None else model.check_start(start, limits, len(signals))

    voxels, parameters = len(signals), len(model.parameters)
    theta = np.full((voxels, parameters), np.nan)
    converged = np.zeros(voxels, dtype=bool)
    iterations = np.zeros(voxels, dtype=np.int64)
    usable = np.flatnonzero(noise.possible(signals).all(axis=1))
    with tqdm(total=len(usable), unit="voxel", disable=not progress, desc="MLE") as bar:
        for first in range(0, len(usable), _CHUNK):
            here = usable[first : first + _CHUNK]
            data = np.ascontiguousarray(signals[here])
            starts = list(model.starting_points(data, limits))
            if start is not None:
                starts.insert(0, start[here])
            best = _best_of(model, noise.at(here), data, starts, limits, max_iterations)
            theta[here], converged[here] = best.theta, best.status == _CONVERGED
            iterations[here] = best.iterations
            bar.update(len(here))

    nll = np.full(voxels, np.nan)
    fitted = np.flatnonzero(np.isfinite(theta).all(axis=1))
    if len(fitted):
        clean = model.signal(theta[fitted])
        nll[fitted] = noise.at(fitted).nll(signals[fitted], clean).sum(axis=1)
    low, high = limits.T
    free = low < high
    bound_hit = np.where(free & (theta == high), 1, np.where(free & (theta == low), -1, 0))
    return Fit(theta, nll, bound_hit.astype(np.int8), converged, iterations)


class MaximumLikelihood:
    """Maximum likelihood as an estimator: signals in, parameters out.

    Parameters
    ----------
    model : SignalModel
    noise : Noise
    bounds : mapping of parameter name to (low, high), optional
        As for :func:`fit_mle`.
    """

    def __init__(
        self,
        model: SignalModel,
        noise: Noise,
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ):
        model.check_bounds(bounds)
        self.model, self.noise, self.bounds = model, noise, bounds
        self.names, self.units = model.names, model.units

    def __repr__(self) -> str:
        return f"MaximumLikelihood({self.model!r}, {self.noise!r})"

    def estimate(self, signals: ArrayLike) -> Array:
        """Estimates for each voxel, started from the data.

        Parameters
        ----------
        signals : (voxels, measurements)

        Returns
        -------
        (voxels, parameters)
            In the model's units; NaN in a voxel that could not be fitted.
        """
        return fit_mle(self.model, self.noise, signals, bounds=self.bounds).theta


def _check_signals(model: SignalModel, signals: ArrayLike) -> Array:
    signals = np.asarray(signals)
    if np.iscomplexobj(signals):
        raise ValueError("signals must be real, got complex values (take magnitudes first)")
    signals = signals.astype(np.float64, copy=False)
    if signals.ndim != 2 or signals.shape[1] != model.measurements:
        raise ValueError(
            f"signals must have shape (voxels, {model.measurements}), one column for each "
            f"measurement of {model!r}, got {signals.shape}"
        )
    return signals


def _best_of(
    model: SignalModel,
    noise: Noise,
    data: Array,
    starts: list[Array],
    limits: Array,
    max_iterations: int,
) -> _Ends:
    """The likeliest end of several descents.

    Every voxel descends from the first two starts. Those that end in two places or do not
    converge, whose likelihood thus has several valleys or a flat one, and those that end on a
    bound, where a valley may be cut off from a deeper one, descend from the other starts too.
    """
    low, high = limits.T
    best = _descend(model, noise, data, starts[0], limits, max_iterations)
    unsettled = np.arange(len(data))
    for begin in starts[1:]:
        end = _descend(
            model, noise.at(unsettled), data[unsettled], begin[unsettled], limits,
            max_iterations, rival=best.at(unsettled),
        )  # fmt: skip
        best.iterations[unsettled] += end.iterations
        better = (end.value < best.value[unsettled]) & (end.status != _JOINED)
        for name in ("theta", "value", "status"):
            getattr(best, name)[unsettled[better]] = getattr(end, name)[better]
        ends = best.theta[unsettled]
        on_bound = (low < high) & ((ends == low) | (ends == high))
        unsettled = unsettled[(end.status != _JOINED) | on_bound.any(axis=1)]
        if len(unsettled) == 0:
            break
    return best


class _Ends(NamedTuple):
    """Where the descents of many voxels ended."""

    theta: Array
    value: Array
    status: NDArray[np.int8]
    iterations: NDArray[np.int64]

    def at(self, voxels: NDArray) -> _Ends:
        return _Ends(*(field[voxels] for field in self))


class _Slots:
    """State of the voxels at work. A voxel that is done gives its slot to the next one."""

    def __init__(self, size: int, measurements: int, parameters: int):
        self.voxel = np.zeros(size, dtype=np.intp)
        self.measured = np.empty((size, measurements))
        self.rival_theta = np.full((size, parameters), np.nan)
        self.rival_value = np.full(size, np.nan)
        self.trial = np.empty((size, parameters))
        self.theta = np.empty((size, parameters))
        self.value = np.empty(size)
        self.gradient = np.empty((size, parameters))
        self.hessian = np.empty((size, parameters, parameters))
        self.predicted = np.empty(size)
        self.damping = np.empty(size)
        self.growth = np.empty(size)
        self.iterations = np.empty(size, dtype=np.int64)
        self.status = np.empty(size, dtype=np.int8)

    def seat(
        self, slots: NDArray, voxels: NDArray, data: Array, begin: Array, rival: _Ends | None
    ) -> None:
        """Begin the descent of `voxels` in `slots`."""
        self.voxel[slots] = voxels
        self.measured[slots] = data[voxels]
        self.trial[slots] = begin[voxels]
        if rival is not None:
            self.rival_theta[slots] = rival.theta[voxels]
            self.rival_value[slots] = rival.value[voxels]
        self.theta[slots] = np.nan
        self.value[slots] = np.inf
        self.predicted[slots] = 0.0
        self.damping[slots] = _FIRST_DAMPING
        self.growth[slots] = 2.0
        self.iterations[slots] = 0
        self.status[slots] = _RUNNING

    def keep(self, slots: NDArray) -> None:
        """Close all other slots."""
        for name, field in vars(self).items():
            setattr(self, name, field[slots])


def _descend(
    model: SignalModel,
    noise: Noise,
    data: Array,
    begin: Array,
    limits: Array,
    max_iterations: int,
    rival: _Ends | None = None,
) -> _Ends:
    """Iterate until no voxel improves, or until it has joined its rival, an earlier end."""
    voxels, parameters = begin.shape
    ends = _Ends(
        np.full((voxels, parameters), np.nan),
        np.full(voxels, np.inf),
        np.full(voxels, _STUCK, dtype=np.int8),
        np.zeros(voxels, dtype=np.int64),
    )
    # As tuples, the bounds tell the compiler the number of parameters.
    low, high = (tuple(side.tolist()) for side in limits.T)
    waiting = min(voxels, _WINDOW)  # the first voxel that has no slot yet
    slots = _Slots(waiting, data.shape[1], parameters)
    slots.seat(np.arange(waiting), np.arange(waiting), data, begin, rival)
    while len(slots.voxel):
        clean, jacobian = model.signal_and_jacobian(slots.trial)
        terms = noise.at(slots.voxel).quadratic_terms(slots.measured, clean)
        _advance(
            *terms, jacobian, low, high, max_iterations,
            slots.rival_theta, slots.rival_value, slots.trial, slots.theta, slots.value,
            slots.gradient, slots.hessian, slots.predicted, slots.damping, slots.growth,
            slots.iterations, slots.status,
        )  # fmt: skip
        done = np.flatnonzero(slots.status != _RUNNING)
        if len(done) == 0:
            continue
        for name in ends._fields:
            getattr(ends, name)[slots.voxel[done]] = getattr(slots, name)[done]
        joining = np.arange(waiting, min(voxels, waiting + len(done)))
        waiting += len(joining)
        slots.seat(done[: len(joining)], joining, data, begin, rival)
        if len(joining) < len(done):
            slots.keep(np.flatnonzero(slots.status == _RUNNING))
    return ends


@njit(cache=True, parallel=True, error_model="numpy")
def _advance(
    value_terms, gradient_terms, curvature_terms, jacobian, low, high, max_iterations,
    rival_theta, rival_value, trial, theta, value, gradient, hessian,
    predicted, damping, growth, iterations, status,
):  # fmt: skip
    """Judge the trial point of each voxel at work and propose the next one."""
    measurements, parameters = jacobian.shape[1], len(low)
    rows = 64  # voxels that share one scratch space
    for block in prange((value.shape[0] + rows - 1) // rows):
        matrix = np.empty((parameters, parameters))
        step = np.empty(parameters)
        free = np.empty(parameters, dtype=np.bool_)
        for v in range(block * rows, min(value.shape[0], (block + 1) * rows)):
            iterations[v] += 1
            total = 0.0
            for m in range(measurements):
                total += value_terms[v, m]
            verdict = _judge(total, value[v], predicted[v], measurements)
            if verdict != _RUNNING:
                status[v] = verdict
                continue
            if total < value[v]:
                if np.isfinite(value[v]):
                    quality = (value[v] - total) / predicted[v]
                    damping[v] *= max(1.0 / 3.0, 1.0 - (2.0 * quality - 1.0) ** 3)
                    damping[v] = max(damping[v], 1e-12)
                growth[v] = 2.0
                value[v] = total
                for p in range(parameters):
                    theta[v, p] = trial[v, p]
                if not _expand(
                    v, gradient_terms, curvature_terms, jacobian, gradient, hessian, low
                ):
                    status[v] = _STUCK
                    continue
                if abs(total - rival_value[v]) < _SAME and _same_place(
                    v, theta, rival_theta, hessian, low
                ):
                    status[v] = _JOINED
                    continue
            else:
                damping[v] *= growth[v]
                growth[v] *= 2.0
            if damping[v] > 1e20 or iterations[v] > max_iterations:
                status[v] = _STUCK
                continue
            # Only descent steps are proposed: with enough damping every bounded step is one,
            # unless the gradient vanishes or points out of the box everywhere.
            while True:
                _bounded_step(
                    v, theta, gradient, hessian, damping[v], low, high, matrix, free, step
                )
                predicted[v] = _predicted_decrease(v, gradient, hessian, step, low)
                if predicted[v] >= _TOLERANCE or damping[v] > 1e3:
                    break
                if _slope_gain(v, theta, gradient, hessian, low, high) < _TOLERANCE:
                    status[v] = _CONVERGED
                    break
                damping[v] *= 10.0
            for p in range(parameters):
                # Exactly on a bound, not a rounding error beside it.
                if step[p] == low[p] - theta[v, p]:
                    trial[v, p] = low[p]
                elif step[p] == high[p] - theta[v, p]:
                    trial[v, p] = high[p]
                else:
                    trial[v, p] = min(max(theta[v, p] + step[p], low[p]), high[p])


@njit(cache=True, error_model="numpy")
def _judge(total, value, predicted, measurements):
    """Whether a voxel whose trial point has the value `total` goes on."""
    if not np.isfinite(value):  # the start
        return _RUNNING if np.isfinite(total) else _STUCK
    # A step whose promised gain is below the rounding of the sum cannot be judged by it.
    if not total < value and predicted < 1e-14 * (measurements + abs(value)):
        return _CONVERGED
    return _RUNNING


# The helpers below take whole arrays and a voxel's index: a view of a row would cost more than
# the arithmetic on it.


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _expand(v, gradient_terms, curvature_terms, jacobian, gradient, hessian, low):
    """Gradient J'g and curvature J'WJ of one voxel; whether both are finite."""
    n = len(low)
    for p in range(n):
        gradient[v, p] = 0.0
        for q in range(n):
            hessian[v, p, q] = 0.0
    for m in range(jacobian.shape[1]):
        g, w = gradient_terms[v, m], curvature_terms[v, m]
        for p in range(n):
            gradient[v, p] += g * jacobian[v, m, p]
            weighted = w * jacobian[v, m, p]
            for q in range(n):  # both triangles: short loops are faster without a branch
                hessian[v, p, q] += weighted * jacobian[v, m, q]
    total = 0.0
    for p in range(n):
        total += gradient[v, p]
        for q in range(n):
            total += hessian[v, p, q]
    return np.isfinite(total)


@njit(cache=True, error_model="numpy")
def _same_place(v, theta, rival_theta, hessian, low):
    """Whether two points lie closer than the noise could ever tell apart."""
    distance = 0.0
    for p in range(len(low)):
        for q in range(len(low)):
            d = (theta[v, p] - rival_theta[v, p]) * (theta[v, q] - rival_theta[v, q])
            distance += hessian[v, p, q] * d
    return distance < _SAME


@njit(cache=True, error_model="numpy")
def _predicted_decrease(v, gradient, hessian, step, low):
    decrease = 0.0
    for p in range(len(low)):
        bend = 0.0
        for q in range(len(low)):
            bend += hessian[v, p, q] * step[q]
        decrease -= step[p] * (gradient[v, p] + 0.5 * bend)
    return decrease


@njit(cache=True, error_model="numpy")
def _slope_gain(v, theta, gradient, hessian, low, high):
    """Largest decrease that moving one parameter alone, within its bounds, can promise."""
    largest = 0.0
    for p in range(len(low)):
        room = (theta[v, p] - low[p]) if gradient[v, p] > 0 else (high[p] - theta[v, p])
        slope, bend = abs(gradient[v, p]), hessian[v, p, p]
        length = slope / bend if bend * room > slope else room
        largest = max(largest, slope * length - 0.5 * bend * length * length)
    return largest


@njit(cache=True, error_model="numpy")
def _bounded_step(v, theta, gradient, hessian, damping, low, high, matrix, free, step):
    """Minimise g's + s'(H + damping D)s / 2 over steps s that stay within the bounds.

    Parameters that the step would carry over a bound are put on it, and the rest solved again:
    at most as many small linear systems as there are parameters.
    """
    n = len(low)
    largest = 0.0
    for p in range(n):
        span = high[p] - low[p]
        largest = max(largest, hessian[v, p, p] * span * span)
        step[p] = 0.0
        outward = (theta[v, p] <= low[p] and gradient[v, p] >= 0.0) or (
            theta[v, p] >= high[p] and gradient[v, p] <= 0.0
        )
        free[p] = not outward
    clipped = True
    while clipped:
        clipped = False
        for p in range(n):
            if not free[p]:  # keep the system square: this parameter's step is known
                for q in range(p):
                    matrix[p, q] = 0.0
                matrix[p, p] = 1.0
                continue
            right = -gradient[v, p]
            for q in range(n):
                if not free[q]:
                    right -= hessian[v, p, q] * step[q]
            for q in range(p):
                matrix[p, q] = hessian[v, p, q] if free[q] else 0.0
            # Marquardt's scaling; a parameter without influence still gets a finite step.
            span = high[p] - low[p]
            floor = 1e-14 * largest / (span * span) + 1e-300
            matrix[p, p] = hessian[v, p, p] * (1.0 + damping) + floor
            step[p] = right
        _solve(matrix, step, low)
        for p in range(n):
            if not free[p]:
                continue
            if not np.isfinite(step[p]):
                step[p] = 0.0
            if theta[v, p] + step[p] < low[p]:
                step[p] = low[p] - theta[v, p]
            elif theta[v, p] + step[p] > high[p]:
                step[p] = high[p] - theta[v, p]
            else:
                continue
            free[p] = False
            clipped = True


@njit(cache=True, error_model="numpy")
def _solve(matrix, right, low):
    """Cholesky solution in place; only the lower triangle of `matrix` is read.

    The diagonal is stored as its inverse: divisions are what this costs.
    """
    n = len(low)
    for i in range(n):
        for j in range(i):
            total = matrix[i, j]
            for k in range(j):
                total -= matrix[i, k] * matrix[j, k]
            matrix[i, j] = total * matrix[j, j]
        total = matrix[i, i]
        for k in range(i):
            total -= matrix[i, k] * matrix[i, k]
        # Rounding can leave a singular matrix slightly negative: no step that way.
        matrix[i, i] = 1.0 / np.sqrt(total) if total > 0.0 else 0.0
        total = right[i]
        for k in range(i):
            total -= matrix[i, k] * right[k]
        right[i] = total * matrix[i, i]
    for i in range(n - 1, -1, -1):
        total = right[i]
        for k in range(i + 1, n):
            total -= matrix[k, i] * right[k]
        right[i] = total * matrix[i, i]
