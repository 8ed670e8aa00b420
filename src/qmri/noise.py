"""Noise of magnetic resonance signals: what it adds, how likely data are, how much they tell.

Nothing here knows a signal model.
Every function works element by element on arrays of shape ``(voxels, measurements)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaincinv, i0e, i1e

Array = NDArray[np.float64]

__all__ = [
    "ComplexGaussian",
    "Gaussian",
    "Noise",
    "QuadraticTerms",
    "Rician",
    "rician_bias",
    "sigma_from_background",
    "sigma_from_repeats",
    "sigma_from_residuals",
    "sigma_from_variances",
]


class QuadraticTerms(NamedTuple):
    """Second-order expansion of the negative log-likelihood in the noise-free signal.

    Each field has shape ``(voxels, measurements)``.
    ``value`` may lack a term that depends on the data alone; ``curvature`` is never negative.
    """

    value: Array
    gradient: Array
    curvature: Array


class Noise(ABC):
    """How a noise-free signal becomes a measured one.

    Parameters
    ----------
    sigma : float or array that broadcasts to (voxels, measurements)
        Standard deviation of the noise in each real channel, in the unit of the signal.
        One number for all, ``(voxels, 1)`` for one per voxel, ``(1, measurements)`` for one
        per measurement.

    Raises
    ------
    ValueError
        If `sigma` holds a value that is not positive and finite.
    """

    def __init__(self, sigma: ArrayLike):
        values = np.asarray(sigma, dtype=np.float64)
        if values.size == 0 or not np.all(np.isfinite(values) & (values > 0)):
            raise ValueError(f"sigma must hold positive, finite standard deviations, got {sigma!r}")
        if values.ndim > 2:
            raise ValueError(
                "sigma must broadcast to (voxels, measurements), "
                f"got an array of shape {values.shape}"
            )
        self.sigma = float(values) if values.ndim == 0 else values

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sigma={self.sigma!r})"

    def at(self, voxels: slice | NDArray) -> Noise:
        """The same noise for a subset of voxels (only a per-voxel sigma is cut)."""
        per_voxel = np.ndim(self.sigma) == 2 and np.shape(self.sigma)[0] > 1
        return type(self)(self.sigma[voxels]) if per_voxel else self

    @abstractmethod
    def sample(self, clean: ArrayLike, rng: np.random.Generator) -> Array:
        """Draw one measured signal for each noise-free one.

        Parameters
        ----------
        clean : (voxels, measurements)
            Noise-free signals.
        rng : numpy.random.Generator
            Source of randomness.

        Returns
        -------
        (voxels, measurements)
        """

    @abstractmethod
    def nll(self, measured: ArrayLike, clean: ArrayLike) -> Array:
        """Negative logarithm of the probability density of each measurement.

        Parameters
        ----------
        measured, clean : (voxels, measurements)
            Measured and noise-free signals.

        Returns
        -------
        (voxels, measurements)
            In nats; ``inf`` where the measurement is impossible.
        """

    @abstractmethod
    def nll_gradient(self, measured: ArrayLike, clean: ArrayLike) -> Array:
        """Derivative of :meth:`nll` with respect to the noise-free signal.

        Parameters
        ----------
        measured, clean : (voxels, measurements)

        Returns
        -------
        (voxels, measurements)
            In nats per unit of signal.
        """

    @abstractmethod
    def fisher_information(self, clean: ArrayLike) -> Array:
        """Fisher information of one measurement about its noise-free signal.

        Parameters
        ----------
        clean : (voxels, measurements)

        Returns
        -------
        (voxels, measurements)
            In 1 / (unit of signal)^2.
        """

    @abstractmethod
    def possible(self, measured: ArrayLike) -> NDArray[np.bool_]:
        """Whether each measurement can occur at all: finite, and non-negative for magnitudes."""

    @abstractmethod
    def quadratic_terms(self, measured: Array, clean: Array) -> QuadraticTerms:
        """What an optimiser needs of the likelihood, in one compiled pass.

        Parameters
        ----------
        measured, clean : (voxels, measurements)
            float64 arrays of the same shape.
        """


class Gaussian(Noise):
    """Additive normal noise of standard deviation `sigma`: the noise of a real channel."""

    def sample(self, clean: ArrayLike, rng: np.random.Generator) -> Array:
        clean = np.asarray(clean, dtype=np.float64)
        return clean + self.sigma * rng.standard_normal(clean.shape)

    def nll(self, measured: ArrayLike, clean: ArrayLike) -> Array:
        z = (np.asarray(measured, dtype=np.float64) - clean) / self.sigma
        return 0.5 * z**2 + np.log(self.sigma * math.sqrt(2 * math.pi))

    def nll_gradient(self, measured: ArrayLike, clean: ArrayLike) -> Array:
        return (np.asarray(clean, dtype=np.float64) - measured) / np.square(self.sigma)

    def fisher_information(self, clean: ArrayLike) -> Array:
        return np.broadcast_to(1 / np.square(self.sigma), np.shape(clean)).astype(np.float64)

    def possible(self, measured: ArrayLike) -> NDArray[np.bool_]:
        return np.isfinite(measured)

    def quadratic_terms(self, measured: Array, clean: Array) -> QuadraticTerms:
        terms = _empty_terms(measured)
        _gaussian_terms(measured, clean, np.broadcast_to(self.sigma, measured.shape), *terms)
        return terms


class Rician(Noise):
    """Magnitude of a complex signal whose two channels carry normal noise of SD `sigma`.

    The density of a measured magnitude m given the noise-free magnitude s is
    m / sigma^2 exp(-(m^2 + s^2) / (2 sigma^2)) I0(m s / sigma^2)
    (Gudbjartsson and Patz 1995 {cite}`gudbjartsson1995rician`).
    A signed noise-free signal counts by its magnitude.
    """

    def sample(self, clean: ArrayLike, rng: np.random.Generator) -> Array:
        clean = np.asarray(clean, dtype=np.float64)
        real = clean + self.sigma * rng.standard_normal(clean.shape)
        return np.hypot(real, self.sigma * rng.standard_normal(clean.shape))

    def nll(self, measured: ArrayLike, clean: ArrayLike) -> Array:
        m = np.asarray(measured, dtype=np.float64) / self.sigma
        s = np.abs(np.asarray(clean, dtype=np.float64)) / self.sigma
        with np.errstate(divide="ignore", invalid="ignore"):
            # i0e(z) = I0(z) exp(-z) never overflows; the exponentials combine into (m - s)^2.
            value = 0.5 * (m - s) ** 2 - np.log(i0e(m * s)) - np.log(m / self.sigma)
        return np.where(m > 0, value, np.where(np.isnan(m), np.nan, np.inf))

    def nll_gradient(self, measured: ArrayLike, clean: ArrayLike) -> Array:
        m = np.asarray(measured, dtype=np.float64) / self.sigma
        s = np.asarray(clean, dtype=np.float64) / self.sigma
        return (s - m * i1e(m * s) / i0e(m * s)) / self.sigma

    def fisher_information(self, clean: ArrayLike) -> Array:
        snr = np.abs(np.asarray(clean, dtype=np.float64)) / self.sigma
        return _information(snr) / np.square(self.sigma)

    def possible(self, measured: ArrayLike) -> NDArray[np.bool_]:
        measured = np.asarray(measured)
        return np.isfinite(measured) & (measured >= 0)

    def quadratic_terms(self, measured: Array, clean: Array) -> QuadraticTerms:
        terms = _empty_terms(measured)
        _rician_terms(
            measured,
            clean,
            np.broadcast_to(self.sigma, measured.shape),
            *_bessel_polynomials(),
            *terms,
        )
        return terms


class ComplexGaussian(Noise):
    """Normal noise of SD `sigma` in each of the two channels of a complex signal.

    The variance of the complex number is therefore 2 sigma^2. Signals keep their phase:
    nothing is lost to a magnitude, and every measurement counts as two real ones.
    """

    def sample(self, clean: ArrayLike, rng: np.random.Generator) -> NDArray[np.complex128]:
        clean = np.asarray(clean, dtype=np.complex128)
        channels = rng.standard_normal((*clean.shape, 2)).view(np.complex128)[..., 0]
        return clean + self.sigma * channels

    def nll(self, measured: ArrayLike, clean: ArrayLike) -> Array:
        z = (np.asarray(measured, dtype=np.complex128) - clean) / self.sigma
        return 0.5 * (z.real**2 + z.imag**2) + np.log(2 * math.pi * np.square(self.sigma))

    def nll_gradient(self, measured: ArrayLike, clean: ArrayLike) -> NDArray[np.complex128]:
        """Derivative of :meth:`nll` by the real part of `clean`, plus 1j times that by the other.

        Parameters
        ----------
        measured, clean : (voxels, measurements)

        Returns
        -------
        (voxels, measurements)
            Complex, in nats per unit of signal.
        """
        return (np.asarray(clean, dtype=np.complex128) - measured) / np.square(self.sigma)

    def fisher_information(self, clean: ArrayLike) -> Array:
        """Fisher information of one measurement about each channel of its noise-free signal.

        Parameters
        ----------
        clean : (voxels, measurements)

        Returns
        -------
        (voxels, measurements)
            Real, in 1 / (unit of signal)^2; the channels tell nothing about each other.
        """
        return np.broadcast_to(1 / np.square(self.sigma), np.shape(clean)).astype(np.float64)

    def possible(self, measured: ArrayLike) -> NDArray[np.bool_]:
        return np.isfinite(measured)

    def quadratic_terms(self, measured: Array, clean: Array) -> QuadraticTerms:
        difference = np.asarray(clean, dtype=np.complex128) - measured
        inverse = np.broadcast_to(1 / np.square(self.sigma), difference.shape)
        value = 0.5 * (difference.real**2 + difference.imag**2) * inverse
        return QuadraticTerms(value, difference * inverse, inverse.astype(np.float64))


# --- estimating sigma ------------------------------------------------------------------------


def sigma_from_repeats(repeats: ArrayLike) -> float:
    """Noise level from images of the same thing, repeated.

    The pooled sample variance over repeats needs no model of the signal.
    It takes the magnitude's spread for sigma: right where the signal is well above the noise,
    too small by 1 % at SNR 5 and by a third without signal (a Rayleigh variable's SD is
    0.655 sigma). Motion and drift between repeats make it too large.

    Parameters
    ----------
    repeats : (voxels, repeats)
        At least two repeats; voxels with a value that is not finite raise an error.

    Returns
    -------
    float
        In the unit of the signal.

    Raises
    ------
    ValueError
        If the shape is wrong, fewer than two repeats are given, or a value is not finite.
    """
    values = _finite_2d("repeats", repeats, "(voxels, repeats)")
    if values.shape[1] < 2:
        raise ValueError(
            f"repeats must hold at least 2 repeats of each voxel, got shape {values.shape}"
        )
    return float(np.sqrt(np.mean(np.var(values, axis=1, ddof=1))))


def sigma_from_variances(variances: ArrayLike, degrees_of_freedom: int) -> float:
    """Noise level of the typical voxel, from each voxel's own estimate of the variance.

    The median over voxels, corrected for what lies between the median and the mean of such
    estimates. A mean over voxels (:func:`sigma_from_repeats`) would follow the few in pulsating
    vessels and at moving borders, whose variance is a hundred times that of the noise; the
    median does not, but what moves everywhere moves it, too.

    Parameters
    ----------
    variances : (voxels,)
        Unbiased estimates, in the squared unit of the signals.
    degrees_of_freedom : int
        Of each of them: n - 1 for n repeats.

    Returns
    -------
    float
        Sigma, in the unit of the signals.

    Raises
    ------
    ValueError
        If there is no voxel, a variance is negative or not finite, or `degrees_of_freedom` is
        below 1.
    """
    variances = np.asarray(variances, dtype=np.float64)
    if variances.ndim != 1 or len(variances) == 0:
        raise ValueError(f"variances must have shape (voxels,), one or more, got {variances.shape}")
    if not (np.isfinite(variances) & (variances >= 0)).all():
        raise ValueError("variances must be finite and not negative")
    if not degrees_of_freedom >= 1:
        raise ValueError(f"degrees_of_freedom must be 1 or more, got {degrees_of_freedom!r}")
    # Of estimates with so many degrees of freedom, if the true variance is 1.
    median = 2 * gammaincinv(degrees_of_freedom / 2, 0.5) / degrees_of_freedom
    return float(np.sqrt(np.median(variances) / median))


def sigma_from_background(magnitudes: ArrayLike) -> float:
    """Noise level from magnitudes where there is no signal.

    Pure noise of a single channel is Rayleigh distributed with a mean square of 2 sigma^2
    (Gudbjartsson and Patz 1995 {cite}`gudbjartsson1995rician`).
    Any signal in the region makes the result too large; zeros written by a scanner that blanks
    the background make it too small, so exact zeros are refused.

    Parameters
    ----------
    magnitudes : array of any shape
        Magnitudes in a region of air.

    Returns
    -------
    float
        In the unit of the signal.

    Raises
    ------
    ValueError
        If the array is empty or holds values that are not finite and positive.
    """
    values = np.asarray(magnitudes, dtype=np.float64).ravel()
    if values.size == 0:
        raise ValueError("magnitudes must hold at least one value, got an empty array")
    if not np.all(np.isfinite(values)):
        raise ValueError(
            f"magnitudes must be finite, got {np.sum(~np.isfinite(values))} values that are not"
        )
    if np.any(values <= 0):
        raise ValueError(
            f"magnitudes must be positive: {np.sum(values <= 0)} of {values.size} are zero or "
            "below, as in a background that the scanner has blanked; choose a region that it "
            "has not"
        )
    return float(np.sqrt(np.mean(values**2) / 2))


def sigma_from_residuals(measured: ArrayLike, fitted: ArrayLike, n_parameters: int) -> float:
    """Noise level from what a least-squares fit leaves over.

    The sum of squares is divided by measurements minus parameters, since each fitted parameter
    takes up one degree of freedom. A model that does not fit makes the result too large; a
    signal at the noise floor makes it too small, as for `sigma_from_repeats`.

    Parameters
    ----------
    measured, fitted : (voxels, measurements)
        Signals, and the model's signals at the estimated parameters.
    n_parameters : int
        Number of parameters fitted in each voxel.

    Returns
    -------
    float
        In the unit of the signal.

    Raises
    ------
    ValueError
        If shapes differ, values are not finite, or no degree of freedom is left.
    """
    measured = _finite_2d("measured", measured, "(voxels, measurements)")
    fitted = _finite_2d("fitted", fitted, "(voxels, measurements)")
    if measured.shape != fitted.shape:
        raise ValueError(
            f"fitted must have the shape of measured, {measured.shape}, got {fitted.shape}"
        )
    freedom = measured.shape[1] - n_parameters
    if n_parameters < 0 or freedom < 1:
        raise ValueError(
            f"n_parameters must be from 0 to {measured.shape[1] - 1} with "
            f"{measured.shape[1]} measurements, got {n_parameters}"
        )
    return float(np.sqrt(np.mean(np.sum((measured - fitted) ** 2, axis=1)) / freedom))


def rician_bias(clean: ArrayLike, sigma: float) -> Array:
    """Mean of a Rician magnitude minus the noise-free signal: the height of the noise floor.

    Parameters
    ----------
    clean : array of any shape
        Noise-free magnitudes.
    sigma : float
        Standard deviation in each channel.

    Returns
    -------
    array of the shape of `clean`
        ``sigma * sqrt(pi / 2)`` without signal, about ``sigma**2 / (2 clean)`` far above noise.

    References
    ----------
    Gudbjartsson and Patz 1995 {cite}`gudbjartsson1995rician`.
    """
    s = np.abs(np.asarray(clean, dtype=np.float64)) / sigma
    half = s**2 / 4
    mean = math.sqrt(math.pi / 2) * ((1 + 2 * half) * i0e(half) + 2 * half * i1e(half))
    return sigma * (mean - s)


def _finite_2d(name: str, values: ArrayLike, shape: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if not np.all(np.isfinite(array)):
        bad = np.sum(~np.isfinite(array).all(axis=1))
        raise ValueError(f"{name} must be finite, got {bad} voxels with NaN or infinite values")
    return array


# --- Rician Fisher information ---------------------------------------------------------------

# The information g(a) of a magnitude of SNR a (sigma = 1) runs from a^2 at a -> 0 to 1 at
# a -> infinity. g(a) (1 + a^2) / a^2 is smooth and within [0.9, 1.1]; as a polynomial in
# t = scale / (scale + a^2) it is exact to 1e-9 for every SNR.
_INFORMATION_SCALE = 4.0
_INFORMATION_DEGREE = 32


@lru_cache(maxsize=1)
def _information_coefficients() -> Array:
    t = (_chebyshev_nodes(_INFORMATION_DEGREE) + 1) / 2
    snr = np.sqrt(_INFORMATION_SCALE * (1 - t) / t)
    ratio = _information_by_quadrature(snr) * (1 + snr**2) / snr**2
    return chebyshev.chebfit(2 * t - 1, ratio, _INFORMATION_DEGREE)


def _information_by_quadrature(snr: Array) -> Array:
    """E[(a - m I1(a m) / I0(a m))^2] over Rician m by Gauss-Legendre; the score's variance."""
    nodes, weights = np.polynomial.legendre.leggauss(300)
    a = snr[:, np.newaxis]
    lower, upper = np.maximum(0, a - 12), a + 12
    m = lower + (upper - lower) * (nodes + 1) / 2
    density = m * np.exp(-((m - a) ** 2) / 2) * i0e(a * m)
    score = a - m * i1e(a * m) / i0e(a * m)
    return np.sum(weights * (upper - lower) / 2 * density * score**2, axis=1)


def _information(snr: Array) -> Array:
    with np.errstate(over="ignore", divide="ignore"):  # snr^2 and 1 / snr^2 may reach infinity
        t = _INFORMATION_SCALE / (_INFORMATION_SCALE + snr**2)
        shape = np.where(snr < 1, snr**2 / (1 + snr**2), 1 / (1 + snr**-2.0))
    return chebyshev.chebval(2 * t - 1, _information_coefficients()) * shape


# --- compiled likelihood terms ---------------------------------------------------------------

# log I0(z) - z = log(t) / 2 + polynomial(t) and I1(z) / I0(z) = z / (z + polynomial(t)) with
# t = scale / (scale + z): both limits, z -> 0 and z -> infinity, are exact, and one pair of
# polynomials serves every z >= 0 with an error below 1e-9.
_BESSEL_SCALE = 5.0
_BESSEL_DEGREE = 26


@lru_cache(maxsize=1)
def _bessel_polynomials() -> tuple[Array, Array]:
    """Coefficients, highest power first, in x = 2 t - 1."""
    x = _chebyshev_nodes(_BESSEL_DEGREE)
    t = (x + 1) / 2
    z = _BESSEL_SCALE * (1 - t) / t
    log_part = np.log(i0e(z)) - 0.5 * np.log(t)
    ratio_part = z * (i0e(z) / i1e(z) - 1)
    return tuple(
        np.ascontiguousarray(
            chebyshev.cheb2poly(chebyshev.chebfit(x, values, _BESSEL_DEGREE))[::-1]
        )
        for values in (log_part, ratio_part)
    )


def _chebyshev_nodes(degree: int) -> Array:
    return np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))


def _empty_terms(like: Array) -> QuadraticTerms:
    return QuadraticTerms(np.empty_like(like), np.empty_like(like), np.empty_like(like))


@njit(cache=True, parallel=True, error_model="numpy")
def _gaussian_terms(measured, clean, sigma, value, gradient, curvature):
    for v in prange(measured.shape[0]):
        for m in range(measured.shape[1]):
            inverse = 1.0 / sigma[v, m]
            z = (clean[v, m] - measured[v, m]) * inverse
            value[v, m] = 0.5 * z * z
            gradient[v, m] = z * inverse
            curvature[v, m] = inverse * inverse


@njit(cache=True, parallel=True, error_model="numpy", fastmath={"contract"})
def _rician_terms(
    measured, clean, sigma, log_coefficients, ratio_coefficients, value, gradient, curvature
):
    voxels, measurements = measured.shape
    rows = 32
    blocks = (voxels + rows - 1) // rows
    for block in prange(blocks):
        # Work on flat stretches: the two polynomials then run in vector registers.
        first, last = block * rows, min(voxels, (block + 1) * rows)
        size = (last - first) * measurements
        x = np.empty(size)
        log_part = np.full(size, log_coefficients[0])
        ratio_part = np.full(size, ratio_coefficients[0])
        k = 0
        for v in range(first, last):
            for m in range(measurements):
                z = measured[v, m] * abs(clean[v, m]) / (sigma[v, m] * sigma[v, m])
                x[k] = 2.0 * _BESSEL_SCALE / (_BESSEL_SCALE + z) - 1.0
                k += 1
        for c in range(1, log_coefficients.shape[0]):
            a, b = log_coefficients[c], ratio_coefficients[c]
            for k in range(size):
                log_part[k] = log_part[k] * x[k] + a
                ratio_part[k] = ratio_part[k] * x[k] + b
        k = 0
        for v in range(first, last):
            for m in range(measurements):
                inverse = 1.0 / sigma[v, m]
                magnitude = measured[v, m] * inverse
                s = clean[v, m] * inverse
                z = magnitude * abs(s)
                ratio = z / (z + ratio_part[k])  # I1(z) / I0(z)
                if s < 0:
                    ratio = -ratio
                log_i0e = log_part[k] + 0.5 * math.log(_BESSEL_SCALE / (_BESSEL_SCALE + z))
                difference = magnitude - abs(s)
                value[v, m] = 0.5 * difference * difference - log_i0e
                gradient[v, m] = (s - magnitude * ratio) * inverse
                # a^2 / (1 + a^2) is the Fisher information within 10 %: its sign is certain
                # where that of the observed second derivative is not.
                snr2 = s * s
                curvature[v, m] = snr2 / (1.0 + snr2) * inverse * inverse
                k += 1
