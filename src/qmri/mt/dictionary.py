"""Dictionary matching: look the fingerprint up in a table of simulated ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmri.models import SignalModel

Array = NDArray[np.float64]

__all__ = ["Dictionary", "Match", "grid", "memory"]

_BLOCK = 2**20  # products of signals and atoms held at once: 16 MB


class Match(NamedTuple):
    """The best entry of a dictionary for each signal.

    Attributes
    ----------
    index : (voxels,) int
        Which entry; -1 for a signal that is zero or not finite.
    theta : (voxels, parameters)
        Its parameters; NaN where there is none.
    amplitude : (voxels,) complex128
        The factor M0 that brings the entry closest to the signal.
    correlation : (voxels,)
        From 0 to 1: how much alike the two are, up to that factor.
    """

    index: NDArray[np.intp]
    theta: Array
    amplitude: NDArray[np.complex128]
    correlation: Array


class Dictionary:
    """An estimator that returns the simulated tissue whose signal looks most alike.

    Parameters
    ----------
    model : SignalModel
        Of complex or real signals without amplitude: a match is up to a complex factor.
    theta : (entries, parameters)
        The tissues it knows: from `grid`, or drawn by ``model.sample``.

    Raises
    ------
    ValueError
        If there is no entry, or a signal of an entry is zero or not finite.

    References
    ----------
    Ma et al. 2013 {cite}`ma2013mrf`; in a low-rank basis, McGivney et al. 2014
    {cite}`mcgivney2014svd`.
    """

    def __init__(self, model: SignalModel, theta: ArrayLike):
        self.model = model
        self.theta = model.check_theta(theta)
        if len(self.theta) == 0:
            raise ValueError("theta must hold at least one entry, got none")
        signals = np.asarray(model.signal(self.theta), dtype=np.complex128)
        self._length = np.linalg.norm(signals, axis=1)
        usable = np.isfinite(self._length) & (self._length > 0)
        if not usable.all():
            raise ValueError(
                f"theta must give signals that are finite and not zero, {np.sum(~usable)} of "
                f"{len(usable)} entries do not (the first is entry {np.argmin(usable)}, "
                f"{self.theta[np.argmin(usable)].tolist()})"
            )
        signals /= self._length[:, np.newaxis]
        self._atoms = np.conj(signals, out=signals)  # (entries, measurements)

    @property
    def names(self) -> tuple[str, ...]:
        return self.model.names

    @property
    def units(self) -> tuple[str, ...]:
        return self.model.units

    @property
    def nbytes(self) -> int:
        """Memory of the stored signals, bytes."""
        return self._atoms.nbytes

    def __len__(self) -> int:
        return len(self.theta)

    def __repr__(self) -> str:
        return f"Dictionary({len(self)} entries of {self.model!r})"

    def estimate(self, signals: ArrayLike) -> Array:
        """Parameters of the best match.

        Parameters
        ----------
        signals : (voxels, measurements)
            Measured signals or coefficients, as the model makes them.

        Returns
        -------
        (voxels, parameters)
            NaN for a signal that is zero or not finite.

        Raises
        ------
        ValueError
            If `signals` does not have one column per measurement of the model.
        """
        return self.match(signals).theta

    def match(self, signals: ArrayLike) -> Match:
        """The best match with its amplitude and how good it is.

        Parameters
        ----------
        signals : (voxels, measurements)
            Measured signals or coefficients, as the model makes them.

        Returns
        -------
        Match

        Raises
        ------
        ValueError
            If `signals` does not have one column per measurement of the model.
        """
        signals = np.asarray(signals)
        measurements = self._atoms.shape[1]
        if signals.ndim != 2 or signals.shape[1] != measurements:
            raise ValueError(
                f"signals must have shape (voxels, {measurements}), as the dictionary's entries, "
                f"got {signals.shape}"
            )
        voxels = len(signals)
        index = np.full(voxels, -1, dtype=np.intp)
        product = np.full(voxels, np.nan + 0j)
        length = np.linalg.norm(signals, axis=1)
        usable = np.flatnonzero(np.isfinite(length) & (length > 0))
        step = min(len(self), 4096)
        rows = max(1, _BLOCK // step)
        for first in range(0, len(usable), rows):
            chosen = usable[first : first + rows]
            index[chosen], product[chosen] = self._best(signals[chosen], step)
        theta = np.where(index[:, np.newaxis] >= 0, self.theta[index], np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = np.minimum(np.abs(product) / length, 1.0)
        return Match(index, theta, product / self._length[index], correlation)

    def discretisation_error(self, theta: ArrayLike) -> Array:
        """Root mean square error of each parameter without any noise.

        Parameters
        ----------
        theta : (voxels, parameters)
            Tissues that need not be in the dictionary.

        Returns
        -------
        (parameters,)
            In the unit of each parameter.
        """
        theta = self.model.check_theta(theta)
        error = self.estimate(self.model.signal(theta)) - theta
        return np.sqrt(np.mean(error**2, axis=0))

    def _best(self, signals: NDArray, step: int) -> tuple[NDArray, NDArray]:
        """Index of the best atom for each signal, and its product with the signal."""
        rows = np.arange(len(signals))
        index = np.zeros(len(signals), dtype=np.intp)
        product = np.zeros(len(signals), dtype=np.complex128)
        power = np.full(len(signals), -1.0)
        for first in range(0, len(self), step):
            products = signals @ self._atoms[first : first + step].T
            powers = products.real**2 + products.imag**2
            best = np.argmax(powers, axis=1)
            better = powers[rows, best] > power
            index[better] = first + best[better]
            product[better] = products[rows, best][better]
            power[better] = powers[rows, best][better]
        return index, product


def grid(model: SignalModel, levels: int | Mapping[str, int]) -> Array:
    """Tissues on a regular grid over the model's training ranges.

    Each range is cut into equal cells, and the levels are their centres: no tissue within the
    range is farther from a level than half a cell.

    Parameters
    ----------
    model : SignalModel
    levels : int or mapping of parameter name to int
        Levels of every parameter, or of those named; one level, the middle, of all others.

    Returns
    -------
    (entries, parameters)
        The product of the levels is the number of entries. A model that does not take every
        combination (T2f longer than T1) needs those left out.

    Raises
    ------
    ValueError
        If a name is not a parameter of the model or a number of levels is below 1.
    """
    if isinstance(levels, Mapping):
        unknown = [name for name in levels if name not in model.names]
        if unknown:
            raise ValueError(
                f"levels must name parameters of the model, {model.names}, got {unknown}"
            )
        counts = [levels.get(name, 1) for name in model.names]
    else:
        counts = [levels] * len(model.names)
    axes = []
    for name, count, (low, high) in zip(model.names, counts, model.training, strict=True):
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"levels of {name} must be a whole number, 1 or more, got {count!r}")
        axes.append(low + (high - low) * (np.arange(count) + 0.5) / count)
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


def memory(levels: Sequence[int], rank: int) -> int:
    """What a dictionary on a grid takes.

    Parameters
    ----------
    levels : sequence of int
        Levels of each parameter.
    rank : int
        Complex numbers kept for each entry.

    Returns
    -------
    int
        Bytes, at 16 for each complex number.
    """
    return 16 * rank * math.prod(int(count) for count in levels)
