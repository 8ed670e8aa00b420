"""The two-pool model as a signal model, with the tissue that networks are trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from qmri.models import Array, Parameter, SignalModel
from qmri.mt import bloch, lineshape
from qmri.mt.basis import check_basis
from qmri.mt.train import PulseTrain

Complex = NDArray[np.complex128]

__all__ = ["MTModel"]

_TYPICAL_T2S = 12e-6  # s
_CHUNK = 512  # tissues simulated before they are compressed: 75 MB with derivatives


class MTModel(SignalModel):
    """Two-pool magnetization transfer under a train of pulses, in its periodic steady state.

    Parameters
    ----------
    train : PulseTrain
    basis : (pulses, rank) complex, optional
        Orthonormal columns; signals then come compressed, as basis^H s.

    Attributes
    ----------
    train : PulseTrain
    basis : (pulses, rank) complex or None
    measurements : int
        Pulses, or the rank of the basis.

    Raises
    ------
    ValueError
        If the basis has another length than the train or is not orthonormal.

    Notes
    -----
    theta holds m0s (share of the semi-solid pool), T1 (s, of both pools), T2f (s, of the free
    pool), Rx (exchange rate, 1/s), T2s (s, of the semi-solid pool), B0 (rad/s, off-resonance)
    and B1 (1, of the nominal flip angle). Signals are complex, for M0 = 1, read in the middle
    between two pulses. The model is that of Assländer et al. {cite}`asslander2022bloch`.

    Tissue for training follows Zhang et al. {cite}`zhang2022crb`: truncated Gaussian
    distributions m0s 0.12 +- 0.08, T1 1.6 +- 0.8 s, T2f 0.1 +- 0.2 s up to T1, Rx 44 +- 20 /s
    and B1 1 +- 0.3, and uniform B0. What the paper leaves open is fixed here: m0s up to 0.6,
    T1 from 0.1 to 5 s, T2f from 2 ms, Rx up to 150 /s, T2s 12 +- 3 us between 8 and 20 us, B0
    within one period of the train, pi / TR to either side, and B1 from 0.2 to 1.9.
    """

    def __init__(self, train: PulseTrain, basis: ArrayLike | None = None):
        if not isinstance(train, PulseTrain):
            raise ValueError(f"train must be a PulseTrain, got {type(train).__name__}")
        self.train = train
        self.basis = None if basis is None else check_basis(basis, train.pulses)
        self.measurements = train.pulses if basis is None else self.basis.shape[1]
        self._conjugate = None if basis is None else self.basis.conj()
        half_period = np.pi / train.repetition_time
        t2s, b1 = _tabulated(train)
        self.parameters = (
            Parameter("m0s", r"m_0^s", "1", (0.0, 0.6), (0.0, 0.6)),
            Parameter("T1", "T_1", "s", (0.1, 5.0), (0.05, 8.0)),
            Parameter("T2f", "T_2^f", "s", (0.002, 5.0), (0.001, 8.0)),
            Parameter("Rx", r"R_\mathrm{x}", "1/s", (0.0, 150.0), (0.0, 300.0)),
            Parameter("T2s", "T_2^s", "s", _inside((8e-6, 20e-6), t2s),
                      _inside((6e-6, 25e-6), t2s)),
            Parameter("B0", r"\omega_0", "rad/s", (-half_period, half_period),
                      (-2 * half_period, 2 * half_period)),
            Parameter("B1", r"B_1^+", "1", _inside((0.2, 1.9), b1), _inside((0.1, 2.0), b1)),
        )  # fmt: skip

    def __repr__(self) -> str:
        rank = "" if self.basis is None else f", rank {self.measurements}"
        return f"MTModel({self.train!r}{rank})"

    def signal(self, theta: ArrayLike) -> Complex:
        """Noise-free signals of tissue with M0 = 1.

        Parameters
        ----------
        theta : (voxels, 7)

        Returns
        -------
        (voxels, pulses) or (voxels, rank), complex

        Raises
        ------
        ValueError
            If a parameter is not finite or not physical, or the semi-solid pool lies outside
            the range that its line shape is tabulated for.
        """
        theta = self.check_theta(theta)
        signal = np.empty((len(theta), self.measurements), dtype=np.complex128)
        for part in _chunks(len(theta)):
            signal[part] = self._compress(bloch.simulate(self.train, theta[part]))
        return signal

    def jacobian(self, theta: ArrayLike) -> Complex:
        """Derivative of each signal by each parameter, exact.

        Parameters
        ----------
        theta : (voxels, 7)

        Returns
        -------
        (voxels, pulses, 7) or (voxels, rank, 7), complex
            The derivative by M0 is the signal itself.
        """
        return self.signal_and_jacobian(theta)[1]

    def signal_and_jacobian(self, theta: ArrayLike) -> tuple[Complex, Complex]:
        theta = self.check_theta(theta)
        shape = (len(theta), self.measurements)
        signal = np.empty(shape, dtype=np.complex128)
        jacobian = np.empty((*shape, len(self.parameters)), dtype=np.complex128)
        for part in _chunks(len(theta)):
            s, tangents = bloch.simulate_with_jacobian(self.train, theta[part])
            signal[part] = self._compress(s)
            jacobian[part] = self._compress(tangents).swapaxes(1, 2)
        return signal, jacobian

    def _compress(self, signals: Complex) -> Complex:
        return signals if self.basis is None else signals @ self._conjugate

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw tissue from the distributions given above.

        Parameters
        ----------
        n : int
        rng : numpy.random.Generator

        Returns
        -------
        (n, 7)
        """
        if n < 0:
            raise ValueError(f"n must be a number of voxels, 0 or more, got {n!r}")
        columns = {}
        for parameter in self.parameters:
            low, high = parameter.training
            if parameter.name == "T2f":
                high = columns["T1"]
            if parameter.name in _GAUSSIAN:
                mean, sd = _GAUSSIAN[parameter.name]
                columns[parameter.name] = _truncated_gaussian(n, mean, sd, low, high, rng)
            else:
                columns[parameter.name] = rng.uniform(low, high, n)
        return np.stack(list(columns.values()), axis=1)

    def log_prior(self, theta: ArrayLike) -> Array:
        """Logarithm of the density that `sample` draws from.

        Parameters
        ----------
        theta : (voxels, 7)

        Returns
        -------
        (voxels,)
            Up to one number common to all; -inf outside the ranges.
        """
        theta = super().check_theta(theta)
        low, high = self._ranges(theta)
        density = np.zeros(len(theta))
        for p, name in enumerate(self.names):
            if name in _GAUSSIAN:
                mean, sd = _GAUSSIAN[name]
                inside = ndtr((high[:, p] - mean) / sd) - ndtr((low[:, p] - mean) / sd)
                with np.errstate(divide="ignore", invalid="ignore"):
                    density -= 0.5 * ((theta[:, p] - mean) / sd) ** 2 + np.log(inside)
        outside = np.any((theta < low) | (theta > high), axis=1)
        return np.where(outside | np.isnan(density), -np.inf, density)

    def prior_sd(self, theta: ArrayLike) -> Array:
        """Width of the distribution of each parameter, SD before truncation, (voxels, 7)."""
        low, high = self.training.T
        sd = [_GAUSSIAN[n][1] if n in _GAUSSIAN else np.nan for n in self.names]
        sd = np.where(np.isnan(sd), (high - low) / np.sqrt(12), sd)
        return np.tile(sd, (len(super().check_theta(theta)), 1))

    def _ranges(self, theta: Array) -> tuple[Array, Array]:
        low, high = (np.tile(x, (len(theta), 1)) for x in self.training.T)
        high[:, self.names.index("T2f")] = theta[:, self.names.index("T1")]
        return low, high

    def check_theta(self, theta: ArrayLike) -> Array:
        theta = super().check_theta(theta)
        _refuse(theta, "theta", ~np.isfinite(theta), self, "finite")
        m0s, t1, t2f, rx, t2s, _, b1 = theta.T
        for name, wrong, expected in (
            ("m0s", (m0s < 0) | (m0s >= 1), "from 0 to below 1"),
            ("T1", t1 <= 0, "positive, in s"),
            ("T2f", (t2f <= 0) | (t2f > t1), "positive and no longer than T1, in s"),
            ("Rx", rx < 0, "0 or more, in 1/s"),
            ("T2s", t2s <= 0, "positive, in s"),
            ("B1", b1 < 0, "0 or more"),
        ):
            if np.any(wrong):
                row = int(np.argmax(wrong))
                value = theta[row, self.names.index(name)]
                raise ValueError(f"theta: {name} must be {expected}, got {value:g} in row {row}")
        if len(theta):
            angles = self.train.flip_angles
            lineshape.check_range([b1.min() * angles.min(), b1.max() * angles.max()], 50.0)
            durations = self.train.durations
            lineshape.check_range(0.0, [durations.min() / t2s.max(), durations.max() / t2s.min()])
        return theta


_GAUSSIAN = {  # mean and SD before truncation
    "m0s": (0.12, 0.08),
    "T1": (1.6, 0.8),
    "T2f": (0.1, 0.2),
    "Rx": (44.0, 20.0),
    "T2s": (12e-6, 3e-6),
    "B1": (1.0, 0.3),
}


def _tabulated(train: PulseTrain) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ranges of T2s (s) and B1 that the table of the line shape covers, for a train of pulses."""
    shortest, longest = train.durations.min(), train.durations.max()
    t2s = longest / lineshape.TAU_RANGE[1], shortest / lineshape.TAU_RANGE[0]
    if t2s[0] > _TYPICAL_T2S or t2s[1] < _TYPICAL_T2S:
        raise ValueError(
            "train must have pulses that the line shape is tabulated for, "
            f"{lineshape.TAU_RANGE[0]:g} to {lineshape.TAU_RANGE[1]:g} times T2s long, got "
            f"{1e3 * shortest:.3g} to {1e3 * longest:.3g} ms"
        )
    strongest = train.flip_angles.max()
    return t2s, (0.0, lineshape.FLIP_ANGLE_RANGE[1] / strongest if strongest > 0 else np.inf)


def _inside(wanted: tuple[float, float], possible: tuple[float, float]) -> tuple[float, float]:
    return max(wanted[0], possible[0]), min(wanted[1], possible[1])


def _refuse(theta: Array, name: str, wrong: Array, model: SignalModel, expected: str) -> None:
    if np.any(wrong):
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name} must be {expected}, got {model.names[column]} = {theta[row, column]} in row "
            f"{row}"
        )


def _chunks(n: int) -> list[slice]:
    return [slice(first, first + _CHUNK) for first in range(0, n, _CHUNK)]


def _truncated_gaussian(
    n: int, mean: float, sd: float, low: ArrayLike, high: ArrayLike, rng: np.random.Generator
) -> Array:
    """By inversion of the distribution function; `low` and `high` are numbers or (n,)."""
    first, last = ndtr((np.asarray(low) - mean) / sd), ndtr((np.asarray(high) - mean) / sd)
    values = mean + sd * ndtri(first + (last - first) * rng.uniform(size=n))
    return np.clip(values, low, high)  # rounding at the ends
