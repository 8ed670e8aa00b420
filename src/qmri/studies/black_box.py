"""A signal that is counted, not calculated: blood on a digitised capillary network.

One may call this model as often as one likes, but there is no derivative by the speed of the
blood to follow. Maximum likelihood does not need one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numba import njit, prange
from numpy.typing import ArrayLike
from tqdm import tqdm

from qmri.datasets import Dataset, labels_from_fit, simulate
from qmri.losses import Recipe
from qmri.mle import Fit, fit_mle
from qmri.models import UM2_PER_MS, Array, Parameter, SignalModel, check_bvalues
from qmri.networks import NetworkEstimator, Networks, mlp_widths
from qmri.noise import Noise, Rician
from qmri.training import Task, train, train_in_parallel

__all__ = [
    "BVALUES",
    "CapillaryFlow",
    "Decoder",
    "DifferenceDecoder",
    "compare",
    "maximum_likelihood",
    "tasks",
]

BVALUES = (0, 10, 20, 30, 50, 80, 100, 200, 400, 800)  # s/mm2
STEP = 0.5  # mm/s, of DifferenceDecoder: two and a half steps of the staircase
PATIENCE = 25


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


class Decoder(SignalModel):
    """The simulator as a layer behind a network, which may ask for any speed.

    The simulator refuses speeds that it has not simulated, and a network in training has not
    learnt yet which those are. Here they are moved to the nearest that was simulated.

    Parameters
    ----------
    flow : CapillaryFlow
    """

    def __init__(self, flow: CapillaryFlow):
        self.flow = flow
        self.parameters, self.measurements = flow.parameters, flow.measurements
        self.amplitude = flow.amplitude

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.flow!r})"

    def signal(self, theta: ArrayLike) -> Array:
        """Noise-free signals, NaN where v is NaN; shapes as for `CapillaryFlow`."""
        theta = self.check_theta(theta)
        return self._shown(theta, self.flow.signal(self._held(theta)))

    def jacobian(self, theta: ArrayLike) -> Array:
        """Derivative of each signal by each parameter, as used in training."""
        return self.signal_and_jacobian(theta)[1]

    def signal_and_jacobian(self, theta: ArrayLike) -> tuple[Array, Array]:
        theta = self.check_theta(theta)
        signal, jacobian = self.flow.signal_and_jacobian(self._held(theta))
        return self._shown(theta, signal), jacobian

    def _held(self, theta: Array) -> Array:
        return _at_speed(theta, np.clip(np.nan_to_num(theta[:, 3]), 0.0, self._fastest))

    def _shown(self, theta: Array, signal: Array) -> Array:
        # A diverged network is the training loop's to notice, not the simulator's to refuse.
        signal[np.isnan(theta[:, 3])] = np.nan
        return signal

    @property
    def _fastest(self) -> float:
        return self.parameters[3].bounds[1]


class DifferenceDecoder(Decoder):
    """The same, with a difference quotient over many steps of the staircase for a slope in v.

    The two further calls of the simulator see the same spins, so that the Monte Carlo error
    that they share drops out of the difference.

    Parameters
    ----------
    flow : CapillaryFlow
    step : float
        Of the central difference, in mm/s; near the ends of the range simulated the nearest
        full difference stands in.

    Raises
    ------
    ValueError
        If `step` is shorter than a step of the staircase, or leaves no room in the range.
    """

    def __init__(self, flow: CapillaryFlow, step: float = STEP):
        super().__init__(flow)
        stair = flow.spacing / flow.time
        if not stair <= step <= self._fastest / 2:
            raise ValueError(
                f"step must be from {stair:g} mm/s, one step of the staircase, to "
                f"{self._fastest / 2:g} mm/s, got {step!r}"
            )
        self.step = step

    def __repr__(self) -> str:
        return f"DifferenceDecoder({self.flow!r}, step={self.step:g})"

    def signal_and_jacobian(self, theta: ArrayLike) -> tuple[Array, Array]:
        theta = self.check_theta(theta)
        signal, jacobian = super().signal_and_jacobian(theta)
        centre = np.clip(np.nan_to_num(theta[:, 3]), self.step, self._fastest - self.step)
        above = self.flow.signal(_at_speed(theta, centre + self.step))
        below = self.flow.signal(_at_speed(theta, centre - self.step))
        jacobian[:, :, 3] = (above - below) / (2 * self.step)
        return signal, jacobian


def _at_speed(theta: Array, v: Array) -> Array:
    return np.column_stack([theta[:, :3], v])


def tasks(dataset: Dataset, seed: int = 0) -> dict[str, Task]:
    """Four ways to teach a network the flow, by name.

    Parameters
    ----------
    dataset : Dataset
        Of a `CapillaryFlow`, with labels ``"mle"``.
    seed : int
        Of the order in which each network meets the data.

    Returns
    -------
    dict of str to Task
        ``"supervised-gt"``, ``"supervised-mle"``, ``"self-supervised"`` through the exact
        derivative, and ``"self-supervised-differences"`` through difference quotients.
    """
    through = replace(dataset, model=Decoder(dataset.model))
    differences = replace(dataset, model=DifferenceDecoder(dataset.model))
    return {
        "supervised-gt": Task(dataset, Recipe({"truth": 1.0}), seed),
        "supervised-mle": Task(dataset, Recipe({"mle": 1.0}), seed),
        "self-supervised": Task(through, Recipe({}), seed),
        "self-supervised-differences": Task(differences, Recipe({}), seed),
    }


def compare(
    voxels: int,
    epochs: int,
    seed: int,
    replicates: int = 3,
    snr: float = 30,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Networks of all kinds and maximum likelihood on blood flow, on tissue they have not seen.

    Parameters
    ----------
    voxels : int
        Synthetic signals, a fifth of them for validation; as many again for the test.
    epochs : int
        At most; a network stops after 25 without a lower validation loss.
    seed : int
        All random numbers follow from it.
    replicates : int
        Independent trainings of each network; the kinds begin from the same weights.
    snr : float
        1 / sigma of the Rician noise.
    checkpoint : path, optional
        As for :func:`qmri.training.train`; the file name begins that of several files.
    progress : bool
        Show progress bars.

    Returns
    -------
    dict of str to array
        ``parameters`` (4,), their names, and ``estimators``: those of `tasks`;
        ``self-supervised-from-gt`` and ``self-supervised-differences-from-gt``, begun from the
        trained supervised-gt of the same replicate; ``mle`` and ``always the mean``, which
        have one replicate only. For each of them, on the test tissue, ``rmse/NAME`` in the
        parameters' units, ``slope/NAME`` (least squares, estimate on truth) and
        ``correlation/NAME`` (NaN for a constant), all (replicates, parameters), and
        ``residual/NAME`` (replicates,), RMS difference between measured and estimated signal
        over sigma. Estimates of v against the truth: ``speed/edges`` (bins + 1,) in mm/s, and
        ``speed/NAME`` (replicates, 3, bins), mean, 10th and 90th percentile in each bin.
        ``epochs/NAME`` (replicates,) counts epochs until training stopped, ``seconds/NAME``
        () times one step of 128 voxels of one network of `tasks`, and of the fit for ``mle``
        one voxel. ``iterations/mle`` is the mean number of iterations of the fit per signal,
        over all steps of v; ``usable`` the share of MLE labels that are learnt from.

    References
    ----------
    That labels of maximum likelihood serve where the signal model has no derivative is a claim
    of Epstein et al. {cite}`epstein2024labels`.
    """
    flow, noise = CapillaryFlow(BVALUES), Rician(1 / snr)
    rng = np.random.default_rng([seed, voxels])
    dataset = simulate(flow, noise, flow.sample(voxels, rng), rng)
    test = simulate(flow, noise, flow.sample(voxels, rng), rng)
    maximum_likelihood(flow, noise, dataset.signals[:10])  # compile, so that it is not timed
    began = time.perf_counter()
    fit = maximum_likelihood(flow, noise, dataset.signals, progress)
    seconds = {"mle": (time.perf_counter() - began) / voxels}
    dataset = dataset.with_labels({"mle": labels_from_fit(fit)})

    kinds = tasks(dataset)
    options = {"epochs": epochs, "patience": PATIENCE, "progress": progress}
    initial = np.random.default_rng([seed, 1]).integers(2**31, size=replicates).tolist()
    begin = Networks(mlp_widths(flow), dataset.mean, initial * len(kinds))
    networks, taken = _trained(begin, kinds, replicates, seed, checkpoint, options)
    seconds |= {name: _seconds_per_step(begin.at([0]), task) for name, task in kinds.items()}
    further = {f"{n}-from-gt": kinds[n] for n in ("self-supervised", "self-supervised-differences")}
    second = None if checkpoint is None else f"{checkpoint}-from-gt"
    begin = networks["supervised-gt"].at(list(range(replicates)) * len(further))
    for found, new in zip(
        (networks, taken), _trained(begin, further, replicates, seed, second, options), strict=True
    ):
        found |= new

    estimates = {
        name: [NetworkEstimator(n.at([k]), flow, snr).estimate(test.signals) for k in range(len(n))]
        for name, n in networks.items()
    }
    estimates["mle"] = [maximum_likelihood(flow, noise, test.signals, progress).theta]
    estimates["always the mean"] = [np.tile(dataset.mean, (voxels, 1))]
    arrays = {"parameters": np.array(flow.names), "estimators": np.array(list(estimates))}
    for name, replicas in estimates.items():
        each = [_scores(theta, test) for theta in replicas]
        arrays |= {f"{score}/{name}": np.array([e[score] for e in each]) for score in each[0]}
    arrays["speed/edges"] = _speed_edges(flow)
    arrays |= {f"epochs/{name}": value for name, value in taken.items()}
    arrays |= {f"seconds/{name}": np.array(value) for name, value in seconds.items()}
    arrays["iterations/mle"] = np.array(fit.iterations.mean())
    arrays["usable"] = np.array(dataset.labels["mle"].usable.mean())
    return arrays


def _trained(
    begin: Networks,
    kinds: Mapping[str, Task],
    replicates: int,
    seed: int,
    checkpoint: str | Path | None,
    options: Mapping,
) -> tuple[dict[str, Networks], dict[str, np.ndarray]]:
    """Networks of each kind, side by side, and the epochs each was trained for."""
    # Seeds of the order of the data: as many as replicates, apart from those of other runs.
    orders = [1000 * seed + k for k in range(replicates)]
    todo = [replace(task, seed=order) for task in kinds.values() for order in orders]
    trained, history = train_in_parallel(begin, todo, checkpoint=checkpoint, **options)
    epochs = np.isfinite(history.validation).sum(axis=0)
    parts = {name: range(k * replicates, (k + 1) * replicates) for k, name in enumerate(kinds)}
    networks = {name: trained.at(part) for name, part in parts.items()}
    return networks, {name: epochs[list(part)] for name, part in parts.items()}


def _seconds_per_step(network: Networks, task: Task, batch: int = 128) -> float:
    """Of one epoch divided by its steps, the fastest of three."""
    steps = math.ceil(task.dataset.training.sum() / batch)
    runs = [train(network, [task], epochs=1, batch=batch)[1].seconds for _ in range(3)]
    return min(runs) / steps


def _speed_edges(flow: CapillaryFlow) -> Array:
    return np.linspace(*flow.parameters[3].training, 10)


def _scores(theta: Array, test: Dataset) -> dict[str, Array]:
    """How well estimates (voxels, 4) agree with the test tissue."""
    truth, flow = test.theta, test.model
    deviation, spread = theta - theta.mean(axis=0), truth - truth.mean(axis=0)
    covariance, variance = (deviation * spread).mean(axis=0), (spread**2).mean(axis=0)
    varies = np.ptp(theta, axis=0) > 0
    sd = np.where(varies, np.sqrt((deviation**2).mean(axis=0)), np.nan)
    residual = Decoder(flow).signal(theta) - test.signals
    edges = _speed_edges(flow)
    bins = np.clip(np.searchsorted(edges, truth[:, 3], side="right") - 1, 0, len(edges) - 2)
    v = [theta[bins == k, 3] for k in range(len(edges) - 1)]
    return {
        "rmse": np.sqrt(np.mean((theta - truth) ** 2, axis=0)),
        "slope": covariance / variance,
        "correlation": covariance / (sd * np.sqrt(variance)),
        "residual": np.sqrt(np.mean(residual**2)) / float(np.mean(test.noise.sigma)),
        "speed": np.array([[x.mean(), *np.quantile(x, (0.1, 0.9))] for x in v]).T,
    }
