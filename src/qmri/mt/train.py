"""The train of radio-frequency pulses that a fingerprint answers to."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmri.sources import load_mt_pulses

Array = NDArray[np.float64]

__all__ = ["PulseTrain"]


@dataclass(frozen=True, eq=False, repr=False)
class PulseTrain:
    """Rectangular pulses, one per repetition time, that repeat for ever.

    The first pulse is the inversion, between equal crusher gradients; every later pulse excites.
    Two trains are equal if they hold the same numbers.

    Parameters
    ----------
    flip_angles : (pulses,)
        Nominal flip angle of each pulse (B1 = 1), rad, from 0 to 2 pi.
    durations : (pulses,)
        Length of each pulse, s; longer than 0 and shorter than the repetition time.
    repetition_time : float
        Time from the middle of one pulse to the middle of the next, s.

    Raises
    ------
    ValueError
        If the arrays are empty, not one-dimensional or of different lengths, a value is not
        finite or out of range, or the numbers look like degrees, milliseconds or microseconds.

    Notes
    -----
    The arrays are copies that cannot be written to.

    References
    ----------
    Assländer et al. 2022 {cite}`asslander2022bloch`; Zhang et al. 2022 {cite}`zhang2022crb`.
    """

    flip_angles: Array
    durations: Array
    repetition_time: float

    def __post_init__(self):
        repetition_time = _check_repetition_time(self.repetition_time)
        flip_angles = _read_only("flip_angles", "rad", self.flip_angles)
        durations = _read_only("durations", "s", self.durations)
        if flip_angles.shape != durations.shape:
            raise ValueError(
                f"durations must hold one value for each of the {len(flip_angles)} flip angles, "
                f"got {len(durations)}"
            )
        _check_flip_angles(flip_angles)
        _check_durations(durations, repetition_time)
        object.__setattr__(self, "flip_angles", flip_angles)
        object.__setattr__(self, "durations", durations)
        object.__setattr__(self, "repetition_time", repetition_time)

    @classmethod
    def published(cls) -> PulseTrain:
        """The train of the in-vivo measurements: 1142 pulses in 4 s.

        Returns
        -------
        PulseTrain

        Raises
        ------
        DataUnavailable, CorruptFile
            As `qmri.fetch` does.

        References
        ----------
        Assländer et al. 2022 {cite}`asslander2022bloch`; Zhang et al. 2022 {cite}`zhang2022crb`.
        """
        flip_angles, durations = load_mt_pulses()
        return cls(flip_angles, durations, REPETITION_TIME)

    @classmethod
    def default(cls, pulses: int = 1142) -> PulseTrain:
        """A train that needs no download: an inversion within five smooth lobes.

        The flip angle rises and falls five times as a squared sine: two lobes, one long and weak
        in which the magnetization recovers, two lobes again. The first one begins before the end
        of the train, so that the inversion meets transverse magnetization and turns it, too.
        Where pulses grow longer as the flip angle rises, the semi-solid pool is spared; where
        they grow shorter, and so stronger, it is saturated. That tells the two pools apart: the
        free pool follows the flip angle alone.

        Parameters
        ----------
        pulses : int
            How many, the inversion included; fewer sample the same lobes more coarsely.

        Returns
        -------
        PulseTrain
            Repetition time 3.5 ms. Flip angles are rounded to 1 urad and durations to 1 us, so
            that every computer makes the same train.

        Raises
        ------
        ValueError
            If `pulses` is not a whole number of at least 50.
        """
        if isinstance(pulses, bool) or not isinstance(pulses, int | np.integer) or pulses < 50:
            raise ValueError(f"pulses must be a whole number, 50 or more, got {pulses!r}")
        place = (np.arange(pulses) / pulses + _START) % 1
        flip_angles = np.full(pulses, _LOWEST_FLIP_ANGLE)
        durations = np.full(pulses, _MIDDLE_DURATION)
        start = 0.0
        for width, height, change in _LOBES:
            inside = (place >= start) & (place < start + width)
            bump = np.where(inside, np.sin(np.pi * (place - start) / width) ** 2, 0.0)
            flip_angles += (height - _LOWEST_FLIP_ANGLE) * bump
            durations += change * bump
            start += width
        flip_angles, durations = np.round(flip_angles, 6), np.round(durations, 6)
        flip_angles[0], durations[0] = np.pi, _INVERSION_DURATION
        return cls(flip_angles, durations, REPETITION_TIME)

    @property
    def pulses(self) -> int:
        """Number of pulses, the inversion included."""
        return len(self.flip_angles)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the numbers in the train, 64 hexadecimal digits."""
        digest = hashlib.sha256(b"PulseTrain")
        for values in (self.flip_angles, self.durations, [self.repetition_time]):
            # Adding zero turns -0.0 into 0.0, which equals it.
            digest.update((np.asarray(values, dtype="<f8") + 0.0).tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PulseTrain):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return (
            f"PulseTrain({self.pulses} pulses of "
            f"{_span(np.rad2deg(self.flip_angles[1:] if self.pulses > 1 else self.flip_angles))}"
            f" deg and {_span(1e3 * self.durations)} ms after an inversion, "
            f"TR {1e3 * self.repetition_time:g} ms, {self.fingerprint[:8]})"
        )


REPETITION_TIME = 3.5e-3  # s, of the published train and of the default one

_LOWEST_FLIP_ANGLE = 0.05  # rad
_MIDDLE_DURATION = 0.36e-3  # s
_INVERSION_DURATION = 0.5e-3  # s

# (share of the train, highest flip angle in rad, change of duration at the top in s)
_LOBES = (
    (0.08, 1.80, +0.14e-3),
    (0.08, 0.95, -0.14e-3),
    (0.68, 0.20, +0.04e-3),
    (0.08, 0.95, -0.14e-3),
    (0.08, 1.80, +0.14e-3),
)
_START = 0.02  # where in the first lobe the inversion lies


def _span(values: Array) -> str:
    return f"{values.min():.3g} to {values.max():.3g}"


def _read_only(name: str, unit: str, given: ArrayLike) -> Array:
    try:
        if np.iscomplexobj(given):
            raise TypeError("complex numbers")
        values = np.array(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be real numbers in {unit}, got {given!r}") from None
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must have shape (pulses,), at least one, got {values.shape}")
    if not np.all(np.isfinite(values)):
        first = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"{name} must be finite, got {values[first]} (pulse {first})")
    values.flags.writeable = False
    return values


def _check_repetition_time(given: float) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError):
        raise ValueError(f"repetition_time must be one number in s, got {given!r}") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"repetition_time must be positive and finite, in s, got {given!r}")
    if value >= 0.5:
        unit, factor = ("us", "1,000,000") if value >= 500 else ("ms", "1000")
        raise ValueError(
            f"repetition_time must be in s, below 0.5 s for a train of this kind, got {value:g}: "
            f"this looks like {unit}, divide by {factor}"
        )
    return value


def _check_flip_angles(values: Array) -> None:
    wrong = np.flatnonzero((values < 0) | (values > 2 * np.pi))
    if wrong.size == 0:
        return
    worst = values[wrong[0]] if values.min() < 0 else values.max()
    hint = ": this looks like degrees, multiply by pi / 180" if values.max() > 2 * np.pi else ""
    raise ValueError(
        f"flip_angles must be in rad, from 0 to 2 pi, got {worst:g} "
        f"({wrong.size} of {values.size} pulses out of range){hint}"
    )


def _check_durations(values: Array, repetition_time: float) -> None:
    if values.min() <= 0:
        first = int(np.argmax(values <= 0))
        raise ValueError(f"durations must be positive, in s, got {values[first]:g} (pulse {first})")
    longest = values.max()
    if longest >= repetition_time:
        hint = ""
        if longest >= 5:
            hint = ": this looks like us, divide by 1,000,000"
        elif longest >= 0.02:
            hint = ": this looks like ms, divide by 1000"
        raise ValueError(
            "durations must be in s and shorter than the repetition time of "
            f"{repetition_time:g} s, the longest is {longest:g}{hint}"
        )
