"""Synthetic data for training: tissue, noisy signals, and the labels a network is taught.

Labels are computed once per data set. What a network may learn from is one of them: the truth,
or the maximum-likelihood estimate of each noisy signal under some noise model.

Fingerprints are kept without noise, with the Cramer-Rao bound of each: noise is drawn anew
whenever a network sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmri.mle import Fit, fit_mle
from qmri.models import Array, SignalModel
from qmri.noise import Noise

__all__ = [
    "Dataset",
    "Fingerprints",
    "Labels",
    "labels_from_fit",
    "mle_labels",
    "simulate",
    "truth_labels",
]


@dataclass(frozen=True, eq=False)
class Labels:
    """What a network is taught about each signal of a data set.

    Attributes
    ----------
    values : (voxels, parameters)
        In the model's units.
    usable : (voxels,) bool
        False where the label is not to be learnt from: an estimate that ended on a bound says
        where the bound is, not what the tissue is.
    bound_hit : (voxels, parameters) int8
        -1 and +1 where a label lies on its lower or upper bound, else 0.
    """

    values: Array
    usable: NDArray[np.bool_]
    bound_hit: NDArray[np.int8]

    def share_on_bounds(self, model: SignalModel) -> dict[str, tuple[float, float]]:
        """Share of labels on the (lower, upper) bound of each parameter of `model`."""
        low, high = (self.bound_hit == -1).mean(axis=0), (self.bound_hit == 1).mean(axis=0)
        return {n: (float(a), float(b)) for n, a, b in zip(model.names, low, high, strict=True)}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Noisy signals with their tissue and labels, split into training and validation.

    Attributes
    ----------
    model : SignalModel
    noise : Noise
        What the signals were made with.
    theta : (voxels, parameters)
        Tissue, the ground truth.
    signals : (voxels, measurements)
        Noisy.
    training : (voxels,) bool
        True for training, False for validation.
    labels : mapping of str to Labels
        ``"truth"`` is always there.
    """

    model: SignalModel
    noise: Noise
    theta: Array
    signals: Array
    training: NDArray[np.bool_]
    labels: Mapping[str, Labels] = field(default_factory=dict)

    def __post_init__(self):
        _check_tissue(self.model, self.theta)
        voxels = len(self.theta)
        for name, shape in (
            ("signals", (voxels, self.model.measurements)),
            ("training", (voxels,)),
        ):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {getattr(self, name).shape}")
        if not np.isfinite(self.signals).all():
            bad = int((~np.isfinite(self.signals)).any(axis=1).sum())
            raise ValueError(f"signals must be finite, got {bad} voxels with NaN or infinity")
        if self.training.all() or not self.training.any():
            raise ValueError(
                "training must leave some voxels for training and some for validation, got "
                f"{int(self.training.sum())} of {voxels} for training"
            )
        labels = {"truth": truth_labels(self.theta), **self.labels}
        for name, label in labels.items():
            if label.values.shape != self.theta.shape or label.usable.shape != (voxels,):
                raise ValueError(
                    f"labels[{name!r}] must have values of shape {self.theta.shape} and usable of "
                    f"shape {(voxels,)}, got {label.values.shape} and {label.usable.shape}"
                )
            if not np.isfinite(label.values[label.usable]).all():
                raise ValueError(f"labels[{name!r}] must be finite wherever they are usable")
        object.__setattr__(self, "labels", labels)

    def with_labels(self, labels: Mapping[str, Labels]) -> Dataset:
        """The same data with further labels, by name."""
        return replace(self, labels={**self.labels, **labels})

    @property
    def mean(self) -> Array:
        """Mean of each parameter over the training tissue, (parameters,)."""
        return self.theta[self.training].mean(axis=0)


def simulate(
    model: SignalModel,
    noise: Noise,
    theta: ArrayLike,
    rng: np.random.Generator,
    validation: float = 0.2,
) -> Dataset:
    """Noisy signals of given tissue, the last of them set aside for validation.

    Parameters
    ----------
    model : SignalModel
    noise : Noise
    theta : (voxels, parameters)
        Tissue, e.g. from ``model.sample``; the same tissue may serve several noise levels.
    rng : numpy.random.Generator
    validation : float
        Share of voxels for validation.

    Raises
    ------
    ValueError
        If there are fewer than two voxels, they are all alike, or `validation` leaves nothing
        for training or for validation.

    References
    ----------
    The split of 80 to 20 is that of Epstein et al. {cite}`epstein2024labels`.
    """
    theta = _check_tissue(model, theta)
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a share between 0 and 1, got {validation!r}")
    kept = len(theta) - round(validation * len(theta))
    training = np.arange(len(theta)) < kept
    return Dataset(model, noise, theta, noise.sample(model.signal(theta), rng), training)


def truth_labels(theta: ArrayLike) -> Labels:
    """The tissue itself as labels; every one of them is usable.

    Parameters
    ----------
    theta : (voxels, parameters)
    """
    theta = np.asarray(theta, dtype=np.float64)
    return Labels(theta, np.ones(len(theta), dtype=bool), np.zeros(theta.shape, dtype=np.int8))


def mle_labels(dataset: Dataset, noise: Noise, progress: bool = False) -> Labels:
    """Maximum-likelihood estimates of a data set's signals, started at the truth.

    Parameters
    ----------
    dataset : Dataset
    noise : Noise
        The noise model assumed; it need not be the one the signals were made with.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Labels
        Not usable where the estimate lies on a bound or the iteration did not converge.

    References
    ----------
    Epstein et al. {cite}`epstein2024labels`.
    """
    fit = fit_mle(dataset.model, noise, dataset.signals, start=dataset.theta, progress=progress)
    return labels_from_fit(fit)


def labels_from_fit(fit: Fit) -> Labels:
    """The estimates of a fit as labels; not usable on a bound or where it did not converge."""
    return Labels(fit.theta, fit.converged & ~fit.at_bound, fit.bound_hit)


def _check_tissue(model: SignalModel, theta: ArrayLike) -> Array:
    theta = model.check_theta(theta)
    if len(theta) < 2:
        raise ValueError(f"theta must hold at least 2 voxels to learn from, got {len(theta)}")
    if not np.isfinite(theta).all():
        bad = int((~np.isfinite(theta)).any(axis=1).sum())
        raise ValueError(f"theta must be finite, got {bad} voxels with NaN or infinity")
    if np.all(theta == theta[0]):
        raise ValueError(
            f"theta must vary, got {len(theta)} voxels that all are {theta[0].tolist()}: there "
            "is nothing to learn"
        )
    return theta


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """Compressed fingerprints with their tissue and the Cramer-Rao bound of what is estimated.

    Attributes
    ----------
    coefficients : (n, rank) complex
        In an orthonormal basis.
    theta : (n, parameters)
        Tissue, the ground truth; its first columns are what is estimated.
    crb : (n, targets)
        Variance bound of each estimated parameter, in its squared unit, at the M0 that is
        contained in the coefficients and at noise of `sigma`; infinite where the fingerprint
        says nothing of the parameter.
    m0 : (n,) complex
        Contained in the coefficients; 1 by default.
    sigma : float
        Standard deviation of the noise of each real and imaginary part that `crb` is for.
    """

    coefficients: NDArray[np.complexfloating]
    theta: Array
    crb: Array
    m0: NDArray[np.complexfloating] | None = None
    sigma: float = 0.01

    def __post_init__(self):
        coefficients = np.asarray(self.coefficients)
        if coefficients.ndim != 2 or not np.iscomplexobj(coefficients):
            raise ValueError(
                "coefficients must be complex and have shape (n, rank), got "
                f"{coefficients.dtype} of shape {coefficients.shape}"
            )
        n = len(coefficients)
        theta, crb = (np.asarray(x, dtype=np.float64) for x in (self.theta, self.crb))
        m0 = np.ones(n, dtype=complex) if self.m0 is None else np.asarray(self.m0, dtype=complex)
        if theta.ndim != 2 or len(theta) != n:
            raise ValueError(f"theta must have shape ({n}, parameters), got {theta.shape}")
        if crb.ndim != 2 or len(crb) != n or not 1 <= crb.shape[1] <= theta.shape[1]:
            raise ValueError(
                f"crb must have shape ({n}, targets) with 1 to {theta.shape[1]} targets, got "
                f"{crb.shape}"
            )
        if m0.shape != (n,):
            raise ValueError(f"m0 must have shape ({n},), got {m0.shape}")
        for name, value in (("coefficients", coefficients), ("theta", theta), ("m0", m0)):
            if not np.isfinite(value).all():
                bad = int((~np.isfinite(value)).reshape(n, -1).any(axis=1).sum())
                raise ValueError(f"{name} must be finite, got {bad} rows with NaN or infinity")
        if not np.all(crb > 0):
            bad = int((~(crb > 0)).any(axis=1).sum())
            raise ValueError(f"crb must be positive, got {bad} rows with NaN or numbers below")
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma!r}")
        values = (("coefficients", coefficients), ("theta", theta), ("crb", crb), ("m0", m0))
        for name, value in values:
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.coefficients)

    @property
    def rank(self) -> int:
        """Coefficients of each fingerprint."""
        return self.coefficients.shape[1]

    @property
    def targets(self) -> Array:
        """The parameters that are estimated, (n, targets)."""
        return self.theta[:, : self.crb.shape[1]]

    def __getitem__(self, chosen: slice | NDArray) -> Fingerprints:
        """Some of the fingerprints, chosen by a slice, a mask or places."""
        parts = (self.coefficients, self.theta, self.crb, self.m0)
        return Fingerprints(*(part[chosen] for part in parts), sigma=self.sigma)

    def split(self, *counts: int) -> tuple[Fingerprints, ...]:
        """The first `counts[0]`, the next `counts[1]`, and so on.

        Raises
        ------
        ValueError
            If there are not so many.
        """
        if min(counts, default=0) < 1 or sum(counts) > len(self):
            raise ValueError(
                f"counts must be positive and add up to at most {len(self)}, got {counts}"
            )
        ends = np.cumsum(counts)
        return tuple(self[end - count : end] for count, end in zip(counts, ends, strict=True))

    def noisy(
        self,
        rng: np.random.Generator,
        sigma: float = 0.01,
        magnitude: tuple[float, float] = (0.1, 1.0),
        conjugation: NDArray[np.complexfloating] | None = None,
    ) -> Fingerprints:
        """The same tissue with another M0 and noise, and the bound that belongs to them.

        Parameters
        ----------
        rng : numpy.random.Generator
        sigma : float
            Standard deviation of the noise of each real and imaginary part.
        magnitude : (float, float)
            |M0| is uniform between these, its phase uniform over the circle.
        conjugation : (rank, rank), optional
            Matrix that, applied to the conjugate coefficients, gives those of the conjugate
            fingerprint. With it every second fingerprint, by chance, is that of the tissue with
            the opposite B0; `theta` is left as it is, as B0 is not estimated.
        """
        low, high = magnitude
        if not 0 < low <= high < np.inf:
            raise ValueError(f"magnitude must be (low, high) with 0 < low <= high, got {magnitude}")
        if not 0 < sigma < np.inf:
            raise ValueError(f"sigma must be positive, got {sigma!r}")
        n = len(self)
        size, phase = rng.uniform(low, high, n), rng.uniform(0, 2 * np.pi, n)
        m0 = size * np.exp(1j * phase)
        coefficients = self.coefficients
        if conjugation is not None:
            if np.shape(conjugation) != (self.rank, self.rank):
                raise ValueError(
                    f"conjugation must have shape {(self.rank, self.rank)}, got "
                    f"{np.shape(conjugation)}"
                )
            mirrored = coefficients.conj() @ np.asarray(conjugation).T
            coefficients = np.where(rng.random(n)[:, np.newaxis] < 0.5, mirrored, coefficients)
        coefficients = (m0[:, np.newaxis] * coefficients).astype(np.complex64)
        noise = rng.standard_normal((n, self.rank, 2), dtype=np.float32)
        coefficients += np.float32(sigma) * noise.view(np.complex64)[..., 0]
        with np.errstate(over="ignore"):
            crb = self.crb * (sigma / self.sigma / size[:, np.newaxis]) ** 2
        return Fingerprints(coefficients, self.theta, crb, m0 * self.m0, sigma=sigma)

    def capped(self, largest: ArrayLike) -> Fingerprints:
        """The same with no bound above `largest`, (targets,), which may be infinite."""
        return replace(self, crb=np.minimum(self.crb, np.asarray(largest, dtype=np.float64)))
