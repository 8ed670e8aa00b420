"""A low-rank basis: a thousand pulses, thirteen numbers.

The signals of all tissues lie close to a space of few dimensions. An orthonormal basis U of it,
(pulses, rank), turns each signal s into coefficients U^H s and leaves white noise white.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
ComplexArray = NDArray[np.complex128]

__all__ = [
    "basis_from_gram",
    "check_basis",
    "compress",
    "conjugation",
    "conjugation_loss",
    "energy_outside",
    "fingerprint",
    "gram_matrix",
    "svd_basis",
]

_ORTHONORMAL = 1e-6  # a basis stored in single precision is good to 1e-7
_BLOCK = 4096  # signals worked on at once: 75 MB of them for 1142 pulses


def svd_basis(signals: ArrayLike, rank: int) -> tuple[ComplexArray, Array]:
    """The basis that keeps most of the energy of a set of signals.

    Parameters
    ----------
    signals : (tissues, pulses)
        Noise-free signals, real or complex.
    rank : int
        How many basis vectors, from 1 to the number of pulses.

    Returns
    -------
    basis : (pulses, rank) complex128
        Left singular vectors of the transposed signals, the strongest first.
    singular_values : (pulses,)
        All of them, falling; those below 1e-8 of the first are rounding errors.

    Raises
    ------
    ValueError
        If the signals do not have two axes, are empty or not finite, or `rank` is out of range.

    Notes
    -----
    By way of the Gram matrix, which needs no second copy of the signals. Sets that do not fit
    into memory go through `gram_matrix` piece by piece.

    References
    ----------
    McGivney et al. 2014 {cite}`mcgivney2014svd`.
    """
    signals = np.asarray(signals)
    return basis_from_gram(gram_matrix([signals]), rank)


def gram_matrix(pieces: Iterable[ArrayLike]) -> ComplexArray:
    """Sum of s s^H over all signals s.

    Parameters
    ----------
    pieces : iterable of (tissues, pulses)
        Noise-free signals, a part of the set at a time; each part is read once.

    Returns
    -------
    (pulses, pulses)
        Hermitian. Its real part is the Gram matrix of the signals together with their complex
        conjugates: half of it, to be exact.

    Raises
    ------
    ValueError
        If there is no signal, the pieces differ in the number of pulses, or a value is not finite.
    """
    gram = None
    for piece in pieces:
        signals = _check_signals(piece)
        if gram is None:
            gram = np.zeros((signals.shape[1], signals.shape[1]), dtype=np.complex128)
        if signals.shape[1] != len(gram):
            raise ValueError(
                f"pieces must all have {len(gram)} pulses as the first one has, "
                f"got one of {signals.shape[1]}"
            )
        for first in range(0, len(signals), _BLOCK):
            block = signals[first : first + _BLOCK]
            gram += block.T @ block.conj()
    if gram is None:
        raise ValueError("pieces must hold at least one array of signals, got none")
    return gram


def basis_from_gram(gram: ArrayLike, rank: int) -> tuple[ComplexArray, Array]:
    """The strongest eigenvectors of a Gram matrix.

    Parameters
    ----------
    gram : (pulses, pulses)
        From `gram_matrix`. Its real part gives a real basis: the natural choice where every
        tissue is as likely to be off resonance by B0 as by -B0, which conjugates the signal.
    rank : int
        How many basis vectors, from 1 to the number of pulses.

    Returns
    -------
    basis, singular_values
        As `svd_basis` returns them. The largest entry of each vector is real and positive.

    Raises
    ------
    ValueError
        If `gram` is not a finite Hermitian matrix or `rank` is out of range.
    """
    gram = np.asarray(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.size == 0:
        raise ValueError(f"gram must have shape (pulses, pulses), got {gram.shape}")
    if not np.all(np.isfinite(gram)):
        raise ValueError("gram must be finite, got NaN or infinite values")
    if np.abs(gram - gram.conj().T).max() > 1e-10 * np.abs(gram).max():
        raise ValueError("gram must be Hermitian, got a matrix that is not")
    _check_rank(rank, len(gram))
    values, vectors = np.linalg.eigh(gram)
    basis = vectors[:, ::-1][:, :rank].astype(np.complex128)
    largest = basis[np.argmax(np.abs(basis), axis=0), np.arange(rank)]
    basis = np.ascontiguousarray(basis * (largest.conj() / np.abs(largest)))
    return basis, np.sqrt(np.maximum(values[::-1], 0))


def check_basis(basis: ArrayLike, pulses: int) -> ComplexArray:
    """A basis as complex128, or an error that says what is wrong with it.

    Parameters
    ----------
    basis : (pulses, rank)
        Orthonormal columns, real or complex.
    pulses : int
        Length of the pulse train that it is for.

    Returns
    -------
    (pulses, rank) complex128

    Raises
    ------
    ValueError
        If the shape is wrong, a value is not finite, or the columns are not orthonormal to 1e-6.
    """
    try:
        values = np.ascontiguousarray(basis, dtype=np.complex128)
    except (TypeError, ValueError):
        raise ValueError(f"basis must hold numbers, got {basis!r}") from None
    if values.ndim != 2 or values.shape[0] != pulses:
        raise ValueError(
            f"basis must have shape ({pulses}, rank), one row for each of the {pulses} pulses of "
            f"the train, got {values.shape}"
        )
    if not 1 <= values.shape[1] <= pulses:
        raise ValueError(
            f"basis must have from 1 to {pulses} columns, one for each coefficient, got "
            f"{values.shape[1]}"
        )
    if not np.all(np.isfinite(values)):
        raise ValueError(f"basis must be finite, got {np.sum(~np.isfinite(values))} that are not")
    error = np.abs(values.conj().T @ values - np.eye(values.shape[1])).max()
    if error > _ORTHONORMAL:
        raise ValueError(
            f"basis must have orthonormal columns, U^H U differs from the identity by {error:.2g}"
        )
    return values


def compress(signals: ArrayLike, basis: ArrayLike) -> ComplexArray:
    """Coefficients U^H s of signals in a basis.

    Parameters
    ----------
    signals : (tissues, pulses)
    basis : (pulses, rank)
        Orthonormal columns.

    Returns
    -------
    (tissues, rank)
    """
    signals = _check_signals(signals)
    return signals @ check_basis(basis, signals.shape[1]).conj()


def energy_outside(signals: ArrayLike, basis: ArrayLike) -> Array:
    """Share of each signal's energy that the basis cannot hold.

    Parameters
    ----------
    signals : (tissues, pulses)
    basis : (pulses, rank)
        Orthonormal columns.

    Returns
    -------
    (tissues,)
        From 0 to 1; 0 for a signal that is zero.
    """
    signals = _check_signals(signals)
    basis = check_basis(basis, signals.shape[1])
    share = np.empty(len(signals))
    for first in range(0, len(signals), _BLOCK):
        block = signals[first : first + _BLOCK]
        left = block - (block @ basis.conj()) @ basis.T
        total = np.sum(np.abs(block) ** 2, axis=1)
        outside = np.sum(np.abs(left) ** 2, axis=1)
        share[first : first + _BLOCK] = np.divide(
            outside, total, out=np.zeros(len(block)), where=total > 0
        )
    return share


def conjugation(basis: ArrayLike) -> ComplexArray:
    """What complex conjugation of the signal does to its coefficients.

    A signal s with coefficients c turns into conj(s) with coefficients M conj(c), where
    M = U^H conj(U), as far as the span of the basis holds conj(s) at all (`conjugation_loss`).
    For a real basis M is the identity.

    Parameters
    ----------
    basis : (pulses, rank)
        Orthonormal columns.

    Returns
    -------
    (rank, rank)
        Symmetric; applied to rows of coefficients as ``coefficients.conj() @ M``.
    """
    basis = check_basis(basis, len(np.asarray(basis)))
    return basis.conj().T @ basis.conj()


def conjugation_loss(basis: ArrayLike) -> float:
    """How far the span of a basis is from being closed under complex conjugation.

    Parameters
    ----------
    basis : (pulses, rank)
        Orthonormal columns.

    Returns
    -------
    float
        The largest share of energy that conjugation moves out of the span, over all signals in
        it: 0 where the span has a real basis, 1 where some signal leaves it altogether.
    """
    kept = np.linalg.svd(conjugation(basis), compute_uv=False).min()
    return float(max(0.0, 1 - kept**2))


def fingerprint(basis: ArrayLike) -> str:
    """Name of a basis: SHA-256 of its shape and of its values rounded to six decimals.

    Parameters
    ----------
    basis : (pulses, rank)
        Real or complex.

    Returns
    -------
    str
        64 hexadecimal digits; the same for a basis kept in single precision, but for values
        that happen to lie at the edge of rounding.
    """
    values = np.ascontiguousarray(basis, dtype=np.complex128)
    millionths = np.round(values.view(np.float64) * 1e6).astype("<i8")
    digest = hashlib.sha256(f"basis {values.shape}".encode())
    digest.update(millionths.tobytes())
    return digest.hexdigest()


def _check_signals(signals: ArrayLike) -> NDArray:
    signals = np.asarray(signals)
    if signals.ndim != 2 or signals.shape[1] == 0:
        raise ValueError(f"signals must have shape (tissues, pulses), got {signals.shape}")
    finite = np.isfinite(signals).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"signals must be finite, got {np.sum(~finite)} of {len(signals)} with NaN or "
            f"infinite values (the first is {np.argmin(finite)})"
        )
    return signals


def _check_rank(rank: int, pulses: int) -> None:
    if isinstance(rank, bool) or rank not in range(1, pulses + 1):
        raise ValueError(f"rank must be a whole number from 1 to {pulses}, got {rank!r}")
