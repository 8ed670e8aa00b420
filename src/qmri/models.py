"""Signal models: tissue parameters in, noise-free signals out.

What the scanner fixes goes into the constructor, what the tissue fixes into the call.
Nothing here knows about noise or estimation.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from numba.core.errors import NumbaError
from numba.np.unsafe.ndarray import to_fixed_tuple
from numpy.typing import ArrayLike, NDArray
from scipy.stats import qmc

from qmri._choices import check_choice

Array = NDArray[np.float64]

__all__ = ["IVIM", "FunctionModel", "Parameter", "SignalModel", "check_bvalues"]

UM2_PER_MS = 1e-3  # mm2/s


@dataclass(frozen=True)
class Parameter:
    """One tissue parameter of a signal model.

    Parameters
    ----------
    name : str
        As in code, e.g. ``"Dslow"``.
    symbol : str
        As in formulas, LaTeX without dollars, e.g. ``r"D_\\mathrm{slow}"``.
    unit : str
        e.g. ``"um2/ms"``; ``"1"`` for a number without unit.
    training : (low, high)
        Range that synthetic tissue is drawn from.
    bounds : (low, high)
        Range that an estimate may take.

    Raises
    ------
    ValueError
        If a range is not an increasing pair of finite numbers, or training leaves the bounds.
    """

    name: str
    symbol: str
    unit: str
    training: tuple[float, float]
    bounds: tuple[float, float]

    def __post_init__(self):
        for field in ("training", "bounds"):
            low, high = (float(x) for x in getattr(self, field))
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(
                    f"{field} of parameter {self.name!r} must be a finite (low, high) with "
                    f"low <= high, got {getattr(self, field)!r}"
                )
            object.__setattr__(self, field, (low, high))
        if self.training[0] < self.bounds[0] or self.training[1] > self.bounds[1]:
            raise ValueError(
                f"training range {self.training} of parameter {self.name!r} must lie within its "
                f"bounds {self.bounds}"
            )


class SignalModel(ABC):
    """A map from tissue parameters to noise-free signals.

    A subclass sets `parameters` and `measurements` and defines :meth:`signal`; one that knows
    its derivatives also defines :meth:`jacobian`, and one that gets both in a single pass
    :meth:`signal_and_jacobian`.

    Attributes
    ----------
    parameters : tuple of Parameter
    measurements : int
        Signals per voxel.
    amplitude : str or None
        Name of a parameter that multiplies the whole signal, if there is one: a search for a
        start then needs no grid over it.
    """

    parameters: tuple[Parameter, ...]
    measurements: int
    amplitude: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(p.unit for p in self.parameters)

    @property
    def training(self) -> Array:
        """Training ranges, (parameters, 2)."""
        return np.array([p.training for p in self.parameters])

    @property
    def bounds(self) -> Array:
        """Fitting bounds, (parameters, 2)."""
        return np.array([p.bounds for p in self.parameters])

    @abstractmethod
    def signal(self, theta: ArrayLike) -> Array:
        """Noise-free signals.

        Parameters
        ----------
        theta : (voxels, parameters)

        Returns
        -------
        (voxels, measurements)
        """

    def jacobian(self, theta: ArrayLike) -> Array:
        """Derivative of each signal by each parameter; here by central differences.

        Parameters
        ----------
        theta : (voxels, parameters)

        Returns
        -------
        (voxels, measurements, parameters)

        Notes
        -----
        The step is 6e-6 (the cube root of the rounding error) times the parameter or, where
        that is larger, a thousandth of its training range: about ten correct digits for a
        smooth signal.
        """
        theta = self.check_theta(theta)
        jacobian = np.empty((len(theta), self.measurements, len(self.parameters)))
        low, high = self.training.T
        steps = _RELATIVE_STEP * np.maximum(np.abs(theta), 1e-3 * (high - low))
        for p in range(len(self.parameters)):
            above, below = theta.copy(), theta.copy()
            above[:, p] += steps[:, p]
            below[:, p] -= steps[:, p]
            width = above[:, p] - below[:, p]  # the step as rounded
            jacobian[:, :, p] = (self.signal(above) - self.signal(below)) / width[:, np.newaxis]
        return jacobian

    def signal_and_jacobian(self, theta: ArrayLike) -> tuple[Array, Array]:
        """Both at once, for optimisers; shapes as in `signal` and `jacobian`."""
        return self.signal(theta), self.jacobian(theta)

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw tissue parameters uniformly over the training ranges.

        Parameters
        ----------
        n : int
            Number of voxels.
        rng : numpy.random.Generator

        Returns
        -------
        (n, parameters)
        """
        if n < 0:
            raise ValueError(f"n must be a number of voxels, 0 or more, got {n!r}")
        low, high = self.training.T
        return rng.uniform(low, high, size=(n, len(self.parameters)))

    def starting_points(self, signals: ArrayLike, bounds: Array | None = None) -> Array:
        """Where an iterative fit may begin, read off the data.

        Here: the best matches among a fixed low-discrepancy set of parameters, compared by
        shape where the model has an `amplitude`.

        Parameters
        ----------
        signals : (voxels, measurements)
            Finite measured signals.
        bounds : (parameters, 2), optional
            Bounds that the starts keep to; the model's own by default.

        Returns
        -------
        (starts, voxels, parameters)
            The likeliest first.
        """
        signals = np.asarray(signals, dtype=np.float64)
        bounds = self.bounds if bounds is None else bounds
        low = np.maximum(self.training[:, 0], bounds[:, 0])
        high = np.minimum(self.training[:, 1], bounds[:, 1])
        low, high = np.minimum(low, bounds[:, 1]), np.maximum(high, bounds[:, 0])
        points = qmc.Halton(len(self.parameters), scramble=False).random(_DICTIONARY + 1)[1:]
        dictionary = low + np.maximum(high - low, 0) * points
        if self.amplitude is not None:
            dictionary[:, self.names.index(self.amplitude)] = 1.0
        atoms = self.signal(dictionary)
        usable = np.isfinite(atoms).all(axis=1) & (np.abs(atoms).max(axis=1) > 0)
        dictionary, atoms = dictionary[usable], atoms[usable]
        chosen = np.empty((_STARTS, len(signals)), dtype=np.intp)
        scale = np.ones((_STARTS, len(signals)))
        _match(signals, np.ascontiguousarray(atoms.T), self.amplitude is not None, chosen, scale)
        starts = dictionary[chosen]
        if self.amplitude is not None:
            starts[:, :, self.names.index(self.amplitude)] = scale
        return np.clip(starts, bounds[:, 0], bounds[:, 1])

    def check_theta(self, theta: ArrayLike) -> Array:
        """`theta` as a float64 array, or a ValueError that names what is wrong with it."""
        theta = np.ascontiguousarray(theta, dtype=np.float64)
        if theta.ndim != 2 or theta.shape[1] != len(self.parameters):
            raise ValueError(
                f"theta must have shape (voxels, {len(self.parameters)}), one column for each of "
                f"{', '.join(self.names)}, got {theta.shape}"
            )
        return theta

    def check_bounds(self, bounds: Mapping[str, tuple[float, float]] | None) -> Array:
        """The model's bounds with those of some parameters replaced.

        Parameters
        ----------
        bounds : mapping of parameter name to (low, high), or None

        Returns
        -------
        (parameters, 2)

        Raises
        ------
        ValueError
            If a name is unknown, or a pair is not finite and in order.
        """
        limits = self.bounds
        for name, pair in (bounds or {}).items():
            if name not in self.names:
                raise ValueError(f"bounds must name parameters among {self.names}, got {name!r}")
            values = np.asarray(pair, dtype=np.float64)
            if values.shape != (2,) or not np.all(np.isfinite(values)) or values[0] > values[1]:
                raise ValueError(
                    f"bounds[{name!r}] must be a finite (low, high) with low <= high, got {pair!r}"
                )
            limits[self.names.index(name)] = values
        return limits

    def check_start(self, start: ArrayLike, limits: Array, voxels: int) -> Array:
        """Where a fit is to begin, for each voxel.

        Parameters
        ----------
        start : (parameters,) or (voxels, parameters)
        limits : (parameters, 2)
            As `check_bounds` returns them.
        voxels : int

        Returns
        -------
        (voxels, parameters)

        Raises
        ------
        ValueError
            If the shape is wrong, or a number lies outside the limits.
        """
        start = np.asarray(start, dtype=np.float64)
        expected = (voxels, len(self.parameters))
        if start.shape not in (expected, expected[1:]):
            raise ValueError(
                f"start must have shape {expected} or {expected[1:]}, got {start.shape}"
            )
        start = np.broadcast_to(start, expected)
        outside = ~((start >= limits[:, 0]) & (start <= limits[:, 1]))
        if outside.any():
            voxel, parameter = np.argwhere(outside)[0]
            raise ValueError(
                f"start must lie within the bounds: {self.names[parameter]} of voxel {voxel} is "
                f"{start[voxel, parameter]:g}, expected {limits[parameter, 0]:g} to "
                f"{limits[parameter, 1]:g}"
            )
        return start


_RELATIVE_STEP = np.finfo(np.float64).eps ** (1 / 3)
_DICTIONARY = 1000
_STARTS = 3


@njit(cache=True, parallel=True, error_model="numpy")
def _match(signals, atoms, scaled, chosen, scale):
    """The atoms (measurements, atoms) closest to each signal, up to a factor if `scaled`."""
    measurements, count = atoms.shape
    power = np.sum(atoms * atoms, axis=0)
    rows = 64  # voxels that share one scratch space
    for block in prange((signals.shape[0] + rows - 1) // rows):
        product = np.empty(count)
        gain = np.empty(chosen.shape[0])
        for v in range(block * rows, min(signals.shape[0], (block + 1) * rows)):
            product[:] = 0.0
            for m in range(measurements):
                for k in range(count):
                    product[k] += signals[v, m] * atoms[m, k]
            gain[:] = -np.inf
            chosen[:, v] = 0
            for k in range(count):
                # How far the atom brings down the sum of squares, at its best factor if scaled.
                g = 2.0 * product[k] - power[k]
                if scaled:
                    g = max(product[k], 0.0) ** 2 / power[k]
                if g <= gain[-1]:
                    continue
                place = gain.shape[0] - 1
                while place > 0 and g > gain[place - 1]:
                    gain[place] = gain[place - 1]
                    chosen[place, v] = chosen[place - 1, v]
                    place -= 1
                gain[place] = g
                chosen[place, v] = k
            if scaled:
                for s in range(chosen.shape[0]):
                    scale[s, v] = max(product[chosen[s, v]], 0.0) / power[chosen[s, v]]


def check_bvalues(bvalues: ArrayLike) -> Array:
    """b-values as float64, or an error that says what is wrong.

    Parameters
    ----------
    bvalues : (measurements,)
        In s/mm2, as .bval files hold them.

    Returns
    -------
    (measurements,)

    Raises
    ------
    ValueError
        If they are not a non-empty list of finite numbers >= 0, hold no b = 0, or are in
        another unit: a largest b-value under 20 looks like ms/um2, one over 100,000 like s/m2.
    """
    try:
        values = np.array(bvalues, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"bvalues must be numbers in s/mm2, got {bvalues!r}") from None
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"bvalues must have shape (measurements,), at least one, got {values.shape}"
        )
    if not np.all(np.isfinite(values)):
        raise ValueError(f"bvalues must be finite, got {values[~np.isfinite(values)][0]}")
    if np.any(values < 0):
        raise ValueError(f"bvalues must not be negative, got {values[values < 0][0]:g} s/mm2")
    if not np.any(values == 0):
        raise ValueError(
            f"bvalues must hold at least one b = 0, the smallest is {values.min():g} s/mm2"
        )
    largest = values.max()
    if 0 < largest < 20:
        raise ValueError(
            f"bvalues must be in s/mm2, the largest is {largest:g}: this looks like ms/um2, "
            "multiply by 1000"
        )
    if largest > 1e5:
        raise ValueError(
            f"bvalues must be in s/mm2, the largest is {largest:g}: this looks like s/m2, "
            "divide by 1,000,000"
        )
    return values


class IVIM(SignalModel):
    """Intravoxel incoherent motion: water that diffuses, and blood that flows.

    S(b) = S0 (f exp(-b (Dfast + Dslow)) + (1 - f) exp(-b Dslow))

    Parameters
    ----------
    bvalues : (measurements,)
        Diffusion weightings in s/mm2, at least one of them 0.

    Notes
    -----
    theta holds S0 (unit of the signal), f (1), Dslow and Dfast (um2/ms = 1e-3 mm2/s).
    Training ranges and fitting bounds are those of Epstein et al. {cite}`epstein2024labels`;
    the model is Le Bihan's {cite}`lebihan1988ivim` with Dfast counted on top of Dslow.
    """

    amplitude = "S0"

    def __init__(self, bvalues: ArrayLike):
        self.bvalues = check_bvalues(bvalues)
        self.bvalues.flags.writeable = False
        self.measurements = len(self.bvalues)
        self.parameters = (
            Parameter("S0", "S_0", "1", (0.8, 1.2), (0.0, 10_000.0)),
            Parameter("f", "f", "1", (0.1, 0.5), (0.01, 0.5)),
            Parameter("Dslow", r"D_\mathrm{slow}", "um2/ms", (0.4, 3.0), (0.01, 4.0)),
            Parameter("Dfast", r"D_\mathrm{fast}", "um2/ms", (10.0, 150.0), (2.0, 300.0)),
        )

    def __repr__(self) -> str:
        return f"IVIM(bvalues={self.bvalues.tolist()})"

    def signal(self, theta: ArrayLike) -> Array:
        theta = self.check_theta(theta)
        signal = np.empty((len(theta), self.measurements))
        _ivim_signal(theta, self.bvalues * UM2_PER_MS, signal)
        return signal

    def jacobian(self, theta: ArrayLike) -> Array:
        """Derivative of each signal by each parameter, in closed form.

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
        signal = np.empty((len(theta), self.measurements))
        jacobian = np.empty((len(theta), self.measurements, 4))
        _ivim_signal_and_jacobian(theta, self.bvalues * UM2_PER_MS, signal, jacobian)
        return signal, jacobian

    def starting_points(self, signals: ArrayLike, bounds: Array | None = None) -> Array:
        """Starts from a segmented search: three speeds of the fast water, the rest by algebra.

        Given Dslow and Dfast the model is linear in S0 f and S0 (1 - f). For each Dfast of a
        short list the Dslow of a grid that leaves the smallest residual is taken together with
        its least-squares amplitudes; the best Dfast of the slow, the middle and the fast third
        of the list each give one start.

        Parameters
        ----------
        signals : (voxels, measurements)
        bounds : (4, 2), optional

        Returns
        -------
        (3, voxels, 4)
            The likeliest first.
        """
        signals = np.ascontiguousarray(signals, dtype=np.float64)
        bounds = self.bounds if bounds is None else bounds
        dslow = _grid(np.geomspace(0.2, 3.8, 16), bounds[2])
        dfast = _grid(np.geomspace(6.0, 200.0, 9), bounds[3])
        b = self.bvalues * UM2_PER_MS
        slow = np.exp(-b[:, np.newaxis] * dslow)
        fast = np.exp(-b[:, np.newaxis] * dfast[:, np.newaxis, np.newaxis]) * slow
        starts = np.empty((3, len(signals), 4))
        _ivim_starts(signals, slow, fast, dslow, dfast, np.ascontiguousarray(bounds), starts)
        return starts


def _grid(values: Array, bounds: Array) -> Array:
    return np.clip(values, bounds[0], bounds[1])


@njit(cache=True, parallel=True, error_model="numpy")
def _ivim_signal(theta, b, signal):
    for v in prange(theta.shape[0]):
        s0, f, dslow, dfast = theta[v]
        for m in range(b.shape[0]):
            slow = math.exp(-b[m] * dslow)
            fast = math.exp(-b[m] * dfast)
            signal[v, m] = s0 * slow * (f * fast + (1.0 - f))


@njit(cache=True, parallel=True, error_model="numpy")
def _ivim_signal_and_jacobian(theta, b, signal, jacobian):
    for v in prange(theta.shape[0]):
        s0, f, dslow, dfast = theta[v]
        for m in range(b.shape[0]):
            slow = math.exp(-b[m] * dslow)
            fast = math.exp(-b[m] * dfast)
            relative = slow * (f * fast + (1.0 - f))
            signal[v, m] = s0 * relative
            jacobian[v, m, 0] = relative
            jacobian[v, m, 1] = s0 * slow * (fast - 1.0)
            jacobian[v, m, 2] = -b[m] * s0 * relative
            jacobian[v, m, 3] = -b[m] * s0 * slow * f * fast


@njit(cache=True, parallel=True, error_model="numpy")
def _ivim_starts(signals, slow, fast, dslow, dfast, bounds, starts):
    """`slow` is (measurements, Dslow), `fast` (Dfast, measurements, Dslow)."""
    n_fast, measurements, n_slow = fast.shape
    third = (n_fast + 2) // 3
    # Gram matrices of the two columns do not depend on the data.
    g22 = np.sum(slow * slow, axis=0)
    g11 = np.empty((n_fast, n_slow))
    g12 = np.empty((n_fast, n_slow))
    for q in range(n_fast):
        g11[q] = np.sum(fast[q] * fast[q], axis=0)
        g12[q] = np.sum(fast[q] * slow, axis=0)
    # A little inside its bounds: without perfusion the curve would not depend on Dfast, and a
    # descent that began there would not know where to turn.
    margin = 0.02 * (bounds[1, 1] - bounds[1, 0])
    f_low, f_high = bounds[1, 0] + margin, bounds[1, 1] - margin
    rows = 64  # voxels that share one scratch space
    for block in prange((signals.shape[0] + rows - 1) // rows):
        y1 = np.empty(n_slow)
        y2 = np.empty(n_slow)
        best = np.empty(3)
        for v in range(block * rows, min(signals.shape[0], (block + 1) * rows)):
            y2[:] = 0.0
            for m in range(measurements):
                for s in range(n_slow):
                    y2[s] += signals[v, m] * slow[m, s]
            for group in range(3):
                best[group] = -1.0
                for q in range(group * third, min((group + 1) * third, n_fast)):
                    y1[:] = 0.0
                    for m in range(measurements):
                        for s in range(n_slow):
                            y1[s] += signals[v, m] * fast[q, m, s]
                    for s in range(n_slow):
                        # Least-squares amplitudes a1 of the fast and a2 of the slow column,
                        # both times the determinant, which is positive.
                        a1 = y1[s] * g22[s] - y2[s] * g12[q, s]
                        a2 = y2[s] * g11[q, s] - y1[s] * g12[q, s]
                        f = a1 / (a1 + a2) if a1 + a2 > 0.0 else 0.0
                        f = min(max(f, f_low), f_high)
                        # With f held within its bounds one amplitude is left.
                        y = f * y1[s] + (1.0 - f) * y2[s]
                        g = (
                            f * f * g11[q, s]
                            + 2.0 * f * (1.0 - f) * g12[q, s]
                            + (1.0 - f) * (1.0 - f) * g22[s]
                        )
                        explained = y * abs(y) / g
                        if explained > best[group] or best[group] < 0.0:
                            best[group] = max(explained, 0.0)
                            starts[group, v, 0] = min(max(y / g, bounds[0, 0]), bounds[0, 1])
                            starts[group, v, 1] = f
                            starts[group, v, 2] = dslow[s]
                            starts[group, v, 3] = dfast[q]
            for i in range(1, 3):  # likeliest first
                for k in range(i, 0, -1):
                    if best[k] > best[k - 1]:
                        best[k], best[k - 1] = best[k - 1], best[k]
                        for p in range(4):
                            swap = starts[k, v, p]
                            starts[k, v, p] = starts[k - 1, v, p]
                            starts[k - 1, v, p] = swap


class FunctionModel(SignalModel):
    """A signal model from one scalar function, the way a reader would write it down.

    Parameters
    ----------
    function : callable
        ``function(x, p1, p2, ...) -> float``: the signal of one measurement, with `x` one
        entry of `acquisition` and the parameters in the order of `parameters`. It is compiled
        with Numba: plain arithmetic, ``if``, ``math`` and ``numpy`` scalar functions.
    acquisition : (measurements,) or (measurements, settings)
        What the scanner varies between measurements.
    parameters : sequence of Parameter
        One for each argument of `function` after the first, with the same names.
    amplitude : str, optional
        Name of a parameter that multiplies the whole signal; it makes the search for a start
        finer.

    Raises
    ------
    ValueError
        If the names of `parameters` are not the arguments of `function`, the acquisition is
        not finite, or the function does not compile or does not return one real number.

    Examples
    --------
    >>> import math
    >>> from qmri import FunctionModel, Parameter
    >>> def spin_echo(echo_time, S0, T2):
    ...     return S0 * math.exp(-echo_time / T2)
    >>> model = FunctionModel(
    ...     spin_echo,
    ...     [10.0, 50.0, 100.0],
    ...     [
    ...         Parameter("S0", "S_0", "1", (0.5, 2.0), (0.0, 100.0)),
    ...         Parameter("T2", "T_2", "ms", (20.0, 200.0), (1.0, 2000.0)),
    ...     ],
    ...     amplitude="S0",
    ... )
    >>> model.signal([[1.0, 50.0]]).round(3).tolist()
    [[0.819, 0.368, 0.135]]
    """

    def __init__(
        self,
        function: Callable[..., float],
        acquisition: ArrayLike,
        parameters: Sequence[Parameter],
        amplitude: str | None = None,
    ):
        self.parameters = tuple(parameters)
        self.acquisition = np.array(acquisition, dtype=np.float64)
        if self.acquisition.ndim not in (1, 2) or self.acquisition.size == 0:
            raise ValueError(
                "acquisition must have shape (measurements,) or (measurements, settings), "
                f"got {self.acquisition.shape}"
            )
        if not np.all(np.isfinite(self.acquisition)):
            raise ValueError("acquisition must be finite, got NaN or infinite values")
        self.measurements = len(self.acquisition)
        arguments = tuple(inspect.signature(function).parameters)[1:]
        if arguments != self.names:
            raise ValueError(
                f"parameters must be named as the arguments of {function.__name__} after the "
                f"first, {arguments}, got {self.names}"
            )
        if amplitude is not None:
            check_choice("amplitude", amplitude, self.names)
        self.amplitude = amplitude
        self.function = function
        self._signal, self._signal_and_jacobian = _compile(function, len(self.parameters))
        middle = np.mean(self.training, axis=1)[np.newaxis]
        try:
            self.signal(middle)
        except NumbaError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"function {function.__name__!r} must be plain scalar arithmetic that Numba can "
                "compile and return one real number (write a SignalModel subclass with a NumPy "
                f"signal method for anything else): {reason}"
            ) from error

    def __repr__(self) -> str:
        return f"FunctionModel({self.function.__name__}, measurements={self.measurements})"

    def signal(self, theta: ArrayLike) -> Array:
        theta = self.check_theta(theta)
        signal = np.empty((len(theta), self.measurements))
        self._signal(theta, self.acquisition, signal)
        return signal

    def jacobian(self, theta: ArrayLike) -> Array:
        return self.signal_and_jacobian(theta)[1]

    def signal_and_jacobian(self, theta: ArrayLike) -> tuple[Array, Array]:
        theta = self.check_theta(theta)
        signal = np.empty((len(theta), self.measurements))
        jacobian = np.empty((len(theta), self.measurements, len(self.parameters)))
        widths = 1e-3 * (self.training[:, 1] - self.training[:, 0])
        self._signal_and_jacobian(theta, self.acquisition, widths, signal, jacobian)
        return signal, jacobian


def _compile(function: Callable[..., float], n_parameters: int) -> tuple[Callable, Callable]:
    """Loops over voxels and measurements around one compiled scalar function.

    On one core: compiling for several would take a reader longer than it saves.
    """
    scalar = function if hasattr(function, "py_func") else njit(error_model="numpy")(function)

    @njit(error_model="numpy")
    def signal_loop(theta, acquisition, signal):
        for v in range(theta.shape[0]):
            parameters = to_fixed_tuple(theta[v], n_parameters)
            for m in range(acquisition.shape[0]):
                signal[v, m] = scalar(acquisition[m], *parameters)

    @njit(error_model="numpy")
    def jacobian_loop(theta, acquisition, widths, signal, jacobian):
        for v in range(theta.shape[0]):
            parameters = to_fixed_tuple(theta[v], n_parameters)
            for m in range(acquisition.shape[0]):
                signal[v, m] = scalar(acquisition[m], *parameters)
            moved = theta[v].copy()
            for p in range(n_parameters):
                step = _RELATIVE_STEP * max(abs(theta[v, p]), widths[p])
                high, low = theta[v, p] + step, theta[v, p] - step
                moved[p] = high
                above = to_fixed_tuple(moved, n_parameters)
                for m in range(acquisition.shape[0]):
                    jacobian[v, m, p] = scalar(acquisition[m], *above)
                moved[p] = low
                below = to_fixed_tuple(moved, n_parameters)
                for m in range(acquisition.shape[0]):
                    difference = jacobian[v, m, p] - scalar(acquisition[m], *below)
                    jacobian[v, m, p] = difference / (high - low)
                moved[p] = theta[v, p]

    return signal_loop, jacobian_loop
