"""How good an unbiased estimator can be: Fisher information and the Cramer-Rao bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from qmri.models import Array, SignalModel
from qmri.noise import Noise

__all__ = ["cramer_rao_bound", "fisher_information"]

# Singular values of the column-normalised Jacobian below this share of the largest are rounding
# errors of a numerical Jacobian, not information.
_SINGULAR = 1e-8


def fisher_information(model: SignalModel, noise: Noise, theta: ArrayLike) -> Array:
    """Information that one noisy signal holds about all parameters together.

    Parameters
    ----------
    model : SignalModel
    noise : Noise
    theta : (voxels, parameters)
        Tissue parameters, in the model's units.

    Returns
    -------
    (voxels, parameters, parameters)
        Symmetric matrices, in 1 / (unit of row times unit of column).

    Raises
    ------
    ValueError
        If `theta` does not have one finite column per model parameter.
    """
    sensitivity = _weighted_jacobian(model, noise, theta)
    return np.einsum("vmp,vmq->vpq", sensitivity, sensitivity)


def cramer_rao_bound(model: SignalModel, noise: Noise, theta: ArrayLike) -> Array:
    """Smallest variance an unbiased estimator of each parameter can have.

    Parameters
    ----------
    model : SignalModel
    noise : Noise
    theta : (voxels, parameters)
        Tissue parameters, in the model's units.

    Returns
    -------
    (voxels, parameters)
        Variances, in the squared unit of each parameter; ``inf`` for each parameter that the
        signal does not identify (f = 0 leaves Dfast unidentified; two parameters that only
        ever change the signal together are both unidentified).

    Raises
    ------
    ValueError
        If `theta` does not have one finite column per model parameter.

    Notes
    -----
    All parameters of the model are unknown: each bound counts what is lost to the others.
    Columns are scaled to unit length before the inversion, which goes through the singular
    values of the weighted Jacobian: squaring it first would lose half of the digits.

    References
    ----------
    Zhang et al. 2022, section 2.1 {cite}`zhang2022crb`.
    """
    sensitivity = _weighted_jacobian(model, noise, theta)
    length = np.linalg.norm(sensitivity, axis=1)
    scale = np.where(length > 0, length, 1.0)
    _, singular, rows = np.linalg.svd(sensitivity / scale[:, np.newaxis], full_matrices=False)
    known = singular > _SINGULAR * singular[:, :1]
    inverse = np.where(known, 1 / np.where(known, singular, 1.0), 0.0)
    variance = np.einsum("vr,vrp->vp", inverse**2, rows**2) / scale**2
    # A parameter is identified if it lies in the span of the directions that are known.
    resolved = np.einsum("vr,vrp->vp", known.astype(float), rows**2)
    return np.where(resolved > 1 - 1e-6, variance, np.inf)


def _weighted_jacobian(model: SignalModel, noise: Noise, theta: ArrayLike) -> Array:
    theta = model.check_theta(theta)
    finite = np.isfinite(theta).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"theta must be finite, got {np.sum(~finite)} voxels with NaN or infinite parameters "
            f"(the first is voxel {np.argmin(finite)})"
        )
    signal, jacobian = model.signal_and_jacobian(theta)
    weight = np.sqrt(noise.fisher_information(signal))
    return jacobian * weight[:, :, np.newaxis]
