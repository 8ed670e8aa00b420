"""A signal that is counted, not calculated: blood on a digitised capillary network.

One may call this model as often as one likes, but there is no derivative by the speed of the
blood to follow. Maximum likelihood does not need one.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange
from numpy.typing import ArrayLike
from tqdm import tqdm

from qmri.mle import Fit, fit_mle
from qmri.models import UM2_PER_MS, Array, Parameter, SignalModel, check_bvalues
from qmri.noise import Noise

__all__ = ["CapillaryFlow", "maximum_likelihood"]


class CapillaryFlow(SignalModel):
    """Water that diffuses, and blood that walks through capillaries, node by node.

    S(b) = S0 exp(-b D) (1 - f + f F(n, b)),  n = floor(v time / spacing),

    where F(n, b) = mean of cos(q x(n)) over the spins of a Monte Carlo simulation, x(n) is how
    far along the gradient a spin is after n nodes, and q = sqrt(b / time).

    Parameters
    ----------
    bvalues : (measurements,)
        Diffusion weightings in s/mm2, at least one of them 0.
    segment : float
        Length of the straight capillary segments in um, a multiple of `spacing`.
    spacing : float
        Distance between neighbouring nodes of the network in um.
    time : float
        Diffusion time in ms, between two gradient pulses taken to be short.
    spins : int
        Spins simulated.
    seed : int
        Of the simulation: the same seed gives the same network.

    Attributes
    ----------
    speeds : (steps,)
        Middle of each step of the staircase within the bounds of v, in mm/s. The signal is the
        same everywhere on a step, so these are all the speeds that data can tell apart.

    Raises
    ------
    ValueError
        If the b-values are not valid (see :func:`qmri.models.check_bvalues`), a length or the
        time is not positive and finite, `segment` is not a multiple of `spacing`, there is no
        spin, or the bounds of v hold no whole step.

    Notes
    -----
    theta holds S0 (unit of the signal), f (1), D (um2/ms) and v (mm/s).

    The picture is that of Le Bihan et al. {cite}`lebihan1988ivim`: capillaries are straight
    segments, each in a random direction, and blood that changes segment many times during the
    diffusion time seems to diffuse, with Dfast = segment * v / 6. In 50 ms blood at 0.5 to
    5 mm/s passes between a quarter of a segment and two and a half of 100 um: too few turns for
    that limit, which is why models of the phase that the walk collects took its place
    {cite}`wetscherek2015ivim`; in an artificial capillary bed they describe the data better and
    recover speed and segment length {cite}`schneider2019ivim`. Red cells in the brain move at
    about 0.8 mm/s {cite}`ivanov1981capillaries`.

    Here the walk is simulated. A spin starts on a random node of a segment, advances one node
    every spacing / v, and takes a new random direction at each junction. It is only ever on a
    node: the default spacing of 10 um is about the size of a red cell. How many nodes it has
    passed is a whole number, so the signal is a staircase in v: its derivative is zero on every
    step and does not exist at the edges. All speeds share the same simulated spins. In the blood
    as in the tissue, water diffuses with D, as in :class:`qmri.IVIM`, which is the limit of many
    short segments.

    Two simplifications matter for real data: gradient pulses take time, and blood does not sit
    on nodes. A simulation without nodes would have a derivative; the model stands for the many
    that have none, such as counts, look-up tables and programs that one can only run.
    """

    amplitude = "S0"

    def __init__(
        self,
        bvalues: ArrayLike,
        segment: float = 100.0,
        spacing: float = 10.0,
        time: float = 50.0,
        spins: int = 5000,
        seed: int = 0,
    ):
        self.bvalues = check_bvalues(bvalues)
        self.bvalues.flags.writeable = False
        self.measurements = len(self.bvalues)
        for name, value in {"segment": segment, "spacing": spacing, "time": time}.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        nodes = round(segment / spacing)
        if nodes < 1 or not math.isclose(nodes * spacing, segment, rel_tol=1e-9):
            raise ValueError(
                f"segment must be a multiple of spacing, got segment={segment!r} um and "
                f"spacing={spacing!r} um"
            )
        if spins < 1:
            raise ValueError(f"spins must be a number of spins, 1 or more, got {spins!r}")
        self.segment, self.spacing, self.time = float(segment), float(spacing), float(time)
        self.spins, self.seed = spins, seed
        self.parameters = (
            Parameter("S0", "S_0", "1", (0.8, 1.2), (0.0, 10_000.0)),
            Parameter("f", "f", "1", (0.1, 0.5), (0.01, 0.5)),
            Parameter("D", "D", "um2/ms", (0.4, 3.0), (0.01, 4.0)),
            Parameter("v", "v", "mm/s", (0.5, 5.0), (0.2, 6.0)),
        )
        slowest, fastest = self.parameters[3].bounds  # mm/s = um/ms
        first, last = math.ceil(slowest * time / spacing), math.floor(fastest * time / spacing)
        if last <= first:
            raise ValueError(
                f"spacing must be short enough for several steps of v from {slowest:g} to "
                f"{fastest:g} mm/s, got spacing={spacing!r} um with time={time!r} ms"
            )
        self.speeds = (np.arange(first, last) + 0.5) * spacing / time
        self.speeds.flags.writeable = False
        wavenumbers = np.sqrt(self.bvalues * UM2_PER_MS / time)  # rad/um
        self._flow = _simulate(wavenumbers, last, nodes, spacing, spins, seed)

    def __repr__(self) -> str:
        return (
            f"CapillaryFlow(bvalues={self.bvalues.tolist()}, segment={self.segment:g}, "
            f"spacing={self.spacing:g}, time={self.time:g}, spins={self.spins}, seed={self.seed})"
        )

    def signal(self, theta: ArrayLike) -> Array:
        """Noise-free signals.

        Parameters
        ----------
        theta : (voxels, 4)

        Returns
        -------
        (voxels, measurements)

        Raises
        ------
        ValueError
            If `theta` has another shape, or a speed lies outside what was simulated: from 0 to
            the upper bound of v.
        """
        return self.signal_and_jacobian(theta)[0]

    def jacobian(self, theta: ArrayLike) -> Array:
        """Derivative of each signal by each parameter: exact, and therefore 0 by v.

        Parameters
        ----------
        theta : (voxels, 4)

        Returns
        -------
        (voxels, measurements, 4)
        """
        return self.signal_and_jacobian(theta)[1]

    def signal_and_jacobian(self, theta: ArrayLike) -> tuple[Array, Array]:
        theta = self.check_theta(theta)
        passed = self._nodes_passed(theta[:, 3])
        signal = np.empty((len(theta), self.measurements))
        jacobian = np.empty((len(theta), self.measurements, 4))
        _signal_and_jacobian(theta, passed, self.bvalues * UM2_PER_MS, self._flow, signal, jacobian)
        return signal, jacobian

    def starting_points(self, signals: ArrayLike, bounds: Array | None = None) -> Array:
        """Starts from a search over D and the steps of v, the rest by algebra.

        Given D and v the model is linear in S0 f and S0 (1 - f). Their least-squares values are
        taken at the best step of v and the best D of a grid: once with little blood (f in the
        lowest fifth of its bounds), once with much (the highest fifth). Slow blood looks like
        slow diffusion, and the likelihood can have a valley for each.

        Parameters
        ----------
        signals : (voxels, measurements)
        bounds : (4, 2), optional

        Returns
        -------
        (2, voxels, 4)
            The likelier first.
        """
        signals = np.asarray(signals, dtype=np.float64)
        bounds = self.bounds if bounds is None else bounds
        d = np.clip(np.geomspace(0.2, 3.8, 16), *bounds[2])
        f_low, f_high = bounds[1]
        fifth = (f_high - f_low) / 5
        ends = ((f_low, f_low + fifth), (f_high - fifth, f_high))
        slow = np.exp(-self.bvalues[:, np.newaxis] * UM2_PER_MS * d)
        starts = np.empty((2, len(signals), 4))
        explained = np.full((2, len(signals)), -np.inf)
        for v in np.unique(np.clip(self.speeds, *bounds[3])):
            fast = self._flow[self._nodes_passed(np.array([v]))[0], :, np.newaxis] * slow
            for end, f_bounds in enumerate(ends):
                gain, theta = _best_d(signals, fast, slow, d, f_bounds, bounds[0])
                better = gain > explained[end]
                explained[end, better] = gain[better]
                starts[end, better, :3] = theta[better]
                starts[end, better, 3] = v
        swapped = explained[1] > explained[0]
        starts[:, swapped] = starts[::-1, swapped]
        return starts

    def _nodes_passed(self, v: Array) -> Array:
        fastest = self.parameters[3].bounds[1]
        outside = ~((v >= 0) & (v <= fastest))
        if outside.any():
            raise ValueError(
                f"v must be from 0 to {fastest:g} mm/s, the speeds simulated, got {v[outside][0]:g}"
            )
        return np.floor(v * self.time / self.spacing).astype(np.intp)


def _simulate(
    wavenumbers: Array, furthest: int, nodes: int, spacing: float, spins: int, seed: int
) -> Array:
    """Mean cosine of the phase after 0, 1, ... `furthest` nodes, (furthest + 1, measurements)."""
    rng = np.random.default_rng(seed)
    entry = rng.integers(nodes, size=spins)
    # Of a random direction only the cosine of its angle with the gradient counts; on a sphere
    # that is uniform.
    cosines = rng.uniform(-1.0, 1.0, size=(spins, (nodes - 1 + furthest) // nodes + 1))
    position = np.zeros(spins)
    flow = np.ones((furthest + 1, len(wavenumbers)))
    for passed in range(furthest):
        position += spacing * cosines[np.arange(spins), (entry + passed) // nodes]
        flow[passed + 1] = np.cos(position[:, np.newaxis] * wavenumbers).mean(axis=0)
    return flow


def _best_d(
    signals: Array,
    fast: Array,
    slow: Array,
    d: Array,
    f_bounds: tuple[float, float],
    s0_bounds: Array,
) -> tuple[Array, Array]:
    """Sum of squares explained (voxels,) and S0, f, D (voxels, 3) at the best D of a grid.

    The two components `fast` and `slow` are (measurements, grid).
    """
    g11, g12, g22 = (fast * fast).sum(0), (fast * slow).sum(0), (slow * slow).sum(0)
    y1, y2 = signals @ fast, signals @ slow
    # Amplitudes of blood and tissue, both times the determinant, which is not negative.
    blood, tissue = y1 * g22 - y2 * g12, y2 * g11 - y1 * g12
    total = blood + tissue
    f = np.clip(np.divide(blood, total, out=np.zeros_like(total), where=total > 0), *f_bounds)
    # With f held within its bounds one amplitude is left.
    y = f * y1 + (1 - f) * y2
    g = f * f * g11 + 2 * f * (1 - f) * g12 + (1 - f) ** 2 * g22
    gain = y * np.abs(y) / g
    best = np.argmax(gain, axis=1)
    rows = np.arange(len(signals))
    s0 = np.clip((y / g)[rows, best], *s0_bounds)
    return gain[rows, best], np.column_stack([s0, f[rows, best], d[best]])


@njit(cache=True, parallel=True, error_model="numpy")
def _signal_and_jacobian(theta, passed, b, flow, signal, jacobian):
    for v in prange(theta.shape[0]):
        s0, f, d = theta[v, 0], theta[v, 1], theta[v, 2]
        for m in range(b.shape[0]):
            slow = math.exp(-b[m] * d)
            relative = slow * (1.0 - f + f * flow[passed[v], m])
            signal[v, m] = s0 * relative
            jacobian[v, m, 0] = relative
            jacobian[v, m, 1] = s0 * slow * (flow[passed[v], m] - 1.0)
            jacobian[v, m, 2] = -b[m] * s0 * relative
            jacobian[v, m, 3] = 0.0


def maximum_likelihood(
    model: CapillaryFlow, noise: Noise, signals: ArrayLike, progress: bool = False
) -> Fit:
    """Most likely parameters of blood flow, without a derivative by its speed.

    The likelihood is the same everywhere on a step of the staircase. So v is held on each step
    in turn, the other three parameters are fitted by :func:`qmri.fit_mle`, and the likeliest
    step wins (the profile likelihood): the whole range of speeds is searched, and no step is
    missed.

    Parameters
    ----------
    model : CapillaryFlow
    noise : Noise
    signals : (voxels, measurements)
        Measured signals, real.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    Fit
        As from :func:`qmri.fit_mle`, with v in the middle of its step. `bound_hit` of v is -1 on
        the slowest step and +1 on the fastest, whose middles are not on the bounds.

    Raises
    ------
    ValueError
        If `signals` has the wrong shape or is complex.
    """
    signals = np.asarray(signals)
    best, lowest = None, None
    for v in tqdm(model.speeds, unit="step", disable=not progress, desc="MLE by steps of v"):
        fit = fit_mle(model, noise, signals, bounds={"v": (v, v)})
        value = _compared(model, noise, signals, fit.theta)
        if best is None:
            best, lowest = fit, value
            continue
        better = value < lowest
        lowest[better] = value[better]
        best.iterations[:] += fit.iterations
        for name in ("theta", "nll", "bound_hit", "converged"):
            getattr(best, name)[better] = getattr(fit, name)[better]
    v = best.theta[:, 3]
    best.bound_hit[:, 3] = np.where(v == model.speeds[-1], 1, np.where(v == model.speeds[0], -1, 0))
    return best


def _compared(model: CapillaryFlow, noise: Noise, signals: Array, theta: Array) -> Array:
    """Negative log-likelihood up to what depends on the data alone, (voxels,).

    Unlike the whole of it, it can be compared where a magnitude is exactly 0; ``inf`` where
    there is no estimate.
    """
    value = np.full(len(theta), np.inf)
    fitted = np.flatnonzero(np.isfinite(theta).all(axis=1))
    if len(fitted):
        clean = model.signal(theta[fitted])
        measured = np.asarray(signals[fitted], dtype=np.float64)
        value[fitted] = noise.at(fitted).quadratic_terms(measured, clean).value.sum(axis=1)
    return value
