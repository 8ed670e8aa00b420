"""How good an unbiased estimator can be: Fisher information and the Cramer-Rao bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmri.models import Array, SignalModel
from qmri.noise import ComplexGaussian, Noise

__all__ = [
    "bound_from_jacobian",
    "bound_with_complex_parameters",
    "cramer_rao_bound",
    "fisher_information",
    "with_amplitude",
]

# Singular values of the column-normalised Jacobian below this share of the largest are rounding
# errors of a numerical Jacobian, not information.
_SINGULAR = 1e-8
_BLOCK = 2**22  # numbers that one block of voxels may hold, 32 MB


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
        Symmetric matrices, in 1 / (unit of row times unit of column). For complex signals the
        real and the imaginary part of the amplitude M0 follow as two more parameters, at M0 = 1.

    Raises
    ------
    ValueError
        If `theta` does not have one finite column per model parameter, or complex signals meet
        a noise model for real ones or the reverse.
    """
    sensitivity = _weighted_jacobian(model, noise, theta)
    return np.einsum("vmp,vmq->vpq", sensitivity, sensitivity)


def cramer_rao_bound(model: SignalModel, noise: Noise, theta: ArrayLike) -> Array:
    """Smallest variance an unbiased estimator of each parameter can have.

    Parameters
    ----------
    model : SignalModel
    noise : Noise
        `ComplexGaussian` for a model of complex signals.
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
        If `theta` does not have one finite column per model parameter, or complex signals meet
        a noise model for real ones or the reverse.

    Notes
    -----
    All parameters of the model are unknown: each bound counts what is lost to the others.
    Columns are scaled to unit length before the inversion, which goes through the singular
    values of the weighted Jacobian: squaring it first would lose half of the digits.

    A complex signal comes with a complex amplitude M0 that nobody knows. Its real and imaginary
    part count as two more unknowns, and the bounds are those at M0 = 1: for another amplitude
    they are divided by ``abs(M0)**2``.

    References
    ----------
    Zhang et al. 2022, section 2.1 {cite}`zhang2022crb`.
    """
    sensitivity = _weighted_jacobian(model, noise, theta)
    return _bound(sensitivity)[:, : len(model.parameters)]


def with_amplitude(signal: ArrayLike, jacobian: ArrayLike) -> NDArray[np.complex128]:
    """The Jacobian of M0 times a complex signal, at M0 = 1.

    Parameters
    ----------
    signal : (voxels, measurements)
        Complex signals.
    jacobian : (voxels, measurements, parameters)
        Their derivatives by the tissue parameters.

    Returns
    -------
    (voxels, measurements, parameters + 2)
        `jacobian`, then the derivatives by the real and by the imaginary part of M0: the
        signal, and 1j times the signal.

    Raises
    ------
    ValueError
        If the shapes do not belong together.
    """
    signal = np.asarray(signal)
    jacobian = np.asarray(jacobian)
    if signal.ndim != 2 or jacobian.ndim != 3 or jacobian.shape[:2] != signal.shape:
        raise ValueError(
            "jacobian must have shape (voxels, measurements, parameters) for a signal of shape "
            f"(voxels, measurements), got {jacobian.shape} for {signal.shape}"
        )
    column = signal[:, :, np.newaxis]
    return np.concatenate([jacobian, column, 1j * column], axis=2)


def bound_from_jacobian(jacobian: ArrayLike, sigma: ArrayLike) -> Array:
    """The Cramer-Rao bound of real parameters from derivatives that are already there.

    Parameters
    ----------
    jacobian : (voxels, measurements, parameters)
        Derivatives of the noise-free signal by each real parameter, nuisances included (see
        `with_amplitude`); real or complex.
    sigma : float or array that broadcasts to (voxels, measurements)
        Standard deviation of the noise in each real channel, in the unit of the signal.

    Returns
    -------
    (voxels, parameters)
        Variances, in the squared unit of each parameter; ``inf`` where not identified.

    Raises
    ------
    ValueError
        If `jacobian` does not have three axes or is not finite, or `sigma` is not positive.

    Notes
    -----
    The Fisher information is Re(J^H J) / sigma^2: a complex measurement is two real ones.
    """
    jacobian = _check_jacobian(jacobian)
    weight = 1 / _check_sigma(sigma, jacobian.shape[:2])
    variance = np.empty((jacobian.shape[0], jacobian.shape[2]))
    for block in _blocks(jacobian):
        rows = weight[block] if weight.shape[0] > 1 else weight
        variance[block] = _bound(_as_real(jacobian[block] * rows[:, :, np.newaxis]))
    return variance


def bound_with_complex_parameters(jacobian: ArrayLike, sigma: ArrayLike) -> Array:
    """What the bound would be if every parameter could be complex.

    The real diagonal of the inverse of J^H J / sigma^2, the complex matrix that
    Zhang et al. 2022 {cite}`zhang2022crb` print. Tissue parameters are real: an estimator that
    knows it does better, so this is never below `bound_from_jacobian`. It is here to show the
    difference.

    Parameters
    ----------
    jacobian : (voxels, measurements, parameters)
        Complex derivatives by each parameter. The amplitude M0 is one column, the signal:
        a second one, 1j times the first, would make the complex matrix singular.
    sigma : float or array that broadcasts to (voxels, measurements)
        Standard deviation of the noise in each real channel, in the unit of the signal.

    Returns
    -------
    (voxels, parameters)
        Variances; ``inf`` where not identified.

    Raises
    ------
    ValueError
        As `bound_from_jacobian` does.
    """
    jacobian = _check_jacobian(jacobian)
    weight = 1 / _check_sigma(sigma, jacobian.shape[:2])
    variance = np.empty((jacobian.shape[0], jacobian.shape[2]))
    for block in _blocks(jacobian):
        rows = weight[block] if weight.shape[0] > 1 else weight
        variance[block] = _bound(jacobian[block] * rows[:, :, np.newaxis])
    return variance


def _bound(sensitivity: NDArray) -> Array:
    """Diagonal of the inverse of S^H S, for S (voxels, measurements, parameters)."""
    length = np.linalg.norm(sensitivity, axis=1)
    scale = np.where(length > 0, length, 1.0)
    scaled = sensitivity / scale[:, np.newaxis]
    if scaled.shape[1] > 4 * scaled.shape[2]:
        scaled = np.linalg.qr(scaled, mode="r")  # the same singular values, in a small matrix
    _, singular, rows = np.linalg.svd(scaled, full_matrices=False)
    share = np.abs(rows) ** 2
    known = singular > _SINGULAR * singular[:, :1]
    inverse = np.where(known, 1 / np.where(known, singular, 1.0), 0.0)
    variance = np.einsum("vr,vrp->vp", inverse**2, share) / scale**2
    # A parameter is identified if it lies in the span of the directions that are known.
    resolved = np.einsum("vr,vrp->vp", known.astype(float), share)
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
    if np.iscomplexobj(signal) != isinstance(noise, ComplexGaussian):
        kind, expected = (
            ("complex", "ComplexGaussian")
            if np.iscomplexobj(signal)
            else ("real", "Gaussian or Rician")
        )
        raise ValueError(f"noise must be {expected} for a model of {kind} signals, got {noise!r}")
    weight = np.sqrt(noise.fisher_information(signal))
    if np.iscomplexobj(signal):
        return _as_real(with_amplitude(signal, jacobian) * weight[:, :, np.newaxis])
    return jacobian * weight[:, :, np.newaxis]


def _as_real(jacobian: NDArray) -> Array:
    """Real and imaginary parts one below the other, (voxels, 2 measurements, parameters)."""
    if not np.iscomplexobj(jacobian):
        return jacobian
    return np.concatenate([jacobian.real, jacobian.imag], axis=1)


def _blocks(jacobian: NDArray) -> list[slice]:
    rows = max(1, _BLOCK // max(1, 2 * jacobian.shape[1] * jacobian.shape[2]))
    return [slice(v, v + rows) for v in range(0, len(jacobian), rows)]


def _check_jacobian(jacobian: ArrayLike) -> NDArray:
    jacobian = np.asarray(jacobian)
    if jacobian.ndim != 3 or 0 in jacobian.shape[1:]:
        raise ValueError(
            "jacobian must have shape (voxels, measurements, parameters), at least one of each, "
            f"got {jacobian.shape}"
        )
    finite = np.isfinite(jacobian).all(axis=(1, 2))
    if not finite.all():
        raise ValueError(
            f"jacobian must be finite, got {np.sum(~finite)} voxels with NaN or infinite "
            f"derivatives (the first is voxel {np.argmin(finite)})"
        )
    return jacobian


def _check_sigma(sigma: ArrayLike, shape: tuple[int, int]) -> Array:
    """Standard deviations with two axes, checked by the noise model that they belong to."""
    values = np.atleast_2d(ComplexGaussian(sigma).sigma)
    try:
        np.broadcast_shapes(values.shape, shape)
    except ValueError:
        raise ValueError(
            f"sigma must broadcast to (voxels, measurements) = {shape}, got an array of shape "
            f"{np.shape(sigma)}"
        ) from None
    return values
