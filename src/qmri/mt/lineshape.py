"""What a radio-frequency pulse does to the semi-solid pool.

The semi-solid pool decays neither exponentially nor slowly: its transverse magnetisation follows a
super-Lorentzian line, which no Bloch equation describes. The generalized Bloch equation
{cite}`asslander2022bloch` does, with an integral over the past of the pulse in the place of the
rate R2s. Its linear approximation, which a fast simulator can use, keeps the Bloch equation and
picks for every pulse the one rate R2l that leaves zs where the integral equation leaves it at the
end of the pulse. R2l depends on two numbers only: the flip angle alpha, and the duration of the
pulse in units of T2s, tau.

`matched_damping` finds that rate (as r = R2l times the duration), `table` tabulates it and
`lookup` interpolates the table inside compiled code.

**Where no rate exists.** A Lorentzian pool can turn zs no further down than
cos(p) exp(-d) (1 + d), with p = 4.4934 (the smallest solution of tan p = p) and
d^2 = alpha^2 - p^2. For flip angles above 1.45 pi and tau between 14 and 111 the super-Lorentzian
pool can go lower: of the usual pulses, only an inversion does, where B1 exceeds 1.45. There r is
the value of the least difference, and zs ends up to 0.1 too high (at tau = 48 and
alpha = 1.94 pi). So that r stays smooth where the rate ceases to exist, zs is there raised by up to
0.007 (`_SOFT` log 2), by less than 1e-4 up to alpha = 1.42 pi, and by less than 1e-6 up to 1.4 pi.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit
from numpy.typing import ArrayLike
from scipy.interpolate import make_interp_spline
from scipy.special import erf

from qmri.models import Array

__all__ = [
    "FLIP_ANGLE_RANGE",
    "TAU_RANGE",
    "check_range",
    "greens_function",
    "lookup",
    "lorentzian_saturation",
    "matched_damping",
    "saturation",
    "table",
]

FLIP_ANGLE_RANGE = (0.0, 2 * np.pi)  # rad
TAU_RANGE = (4.0, 130.0)  # pulse duration over T2s

_LONGEST = 400.0  # in units of T2s: as far as the quadratures below are checked
_LARGEST_ANGLE = 4 * np.pi

_ORIENTATIONS = 96  # quadrature nodes on each side of the magic angle
_COLLOCATION = 48  # polynomial coefficients of zs over the pulse
_HISTORY = 64  # quadrature nodes over the past of each collocation point

_TURN = 4.493409457909064  # rad, the smallest positive solution of tan(p) = p
_SOFT = 0.01  # zs within which the passage to the least difference is spread

_NODES = 28  # at which zs itself is computed, in alpha^2 and in log(tau)
_CELLS = (256, 96)  # of the table, in alpha^2 and in the square root of tau


@lru_cache(maxsize=1)
def _orientations() -> tuple[Array, Array]:
    """|3 z^2 - 1| at the nodes of a quadrature over z in [0, 1], and the weights.

    The nodes crowd cubically towards the magic angle z = 1/sqrt(3), where the slow tail of the
    line comes from.
    """
    x, weight = np.polynomial.legendre.leggauss(_ORIENTATIONS)
    x, weight = (x + 1) / 2, weight / 2
    magic = 1 / np.sqrt(3)
    distance = np.concatenate([-magic * x**3, (1 - magic) * x**3])
    weights = np.concatenate([magic * 3 * x**2 * weight, (1 - magic) * 3 * x**2 * weight])
    return np.abs(3 * distance * (distance + 2 * magic)), weights


def greens_function(k: ArrayLike) -> Array:
    """How much of the semi-solid pool's transverse magnetisation is left after a while.

    The super-Lorentzian G(k) = integral over z in [0, 1] of exp(-k^2 (3 z^2 - 1)^2 / 8): an average
    over the orientations (z the cosine) of Gaussian decays. Accurate to 1e-12.

    Parameters
    ----------
    k : (n,)
        Time in units of T2s, from 0 to 400.

    Returns
    -------
    (n,)
        G, 1 at k = 0.

    Raises
    ------
    ValueError
        If a `k` lies outside [0, 400] or is not finite.

    References
    ----------
    Assländer et al. 2022 {cite}`asslander2022bloch`.
    """
    k = np.asarray(k, float)
    _check("k", k, 0.0, _LONGEST)
    width, weight = _orientations()
    return np.exp(-(np.multiply.outer(k, width) ** 2) / 8) @ weight


def _integrated_greens_function(k: Array) -> Array:
    """Integral of G from 0 to each of `k` (any shape)."""
    width, weight = _orientations()
    width = width / np.sqrt(8)
    return erf(np.multiply.outer(k, width)) @ (weight * np.sqrt(np.pi) / (2 * width))


@lru_cache(maxsize=1)
def _collocation() -> tuple[Array, Array, Array, Array, Array]:
    """Points on [0, 1] at which the integral equation is imposed, and the quadrature over the past.

    Returns the points u (n,), the values (n, n) of the Chebyshev polynomials there, the
    fractions g (q,) of u that have passed since a moment in the past, their weights (q,), and the
    values (n, q, n) of the polynomials at those moments, u (1 - g).
    """
    points = (1 - np.cos(np.pi * np.arange(_COLLOCATION) / (_COLLOCATION - 1))) / 2
    x, weight = np.polynomial.legendre.leggauss(_HISTORY)
    x, weight = (x + 1) / 2, weight / 2
    past, weight = x**3, 3 * x**2 * weight
    moments = points[:, None] * (1 - past)
    chebyshev = np.polynomial.chebyshev.chebvander
    degree = _COLLOCATION - 1
    return (
        points,
        chebyshev(2 * points - 1, degree),
        past,
        weight,
        chebyshev(2 * moments - 1, degree),
    )


def _saturation_loss(alpha: Array, tau: float) -> Array:
    """(1 - zs) / alpha^2 at the end of pulses (n,) of one duration, without cancellation.

    Integrated once in time, the generalized Bloch equation is the Volterra equation
    zs(u) = 1 - (alpha / tau)^2 int_0^u K(u - v) zs(v) dv with K the integral of G. zs is smooth,
    so a Chebyshev series that fulfils the equation at the Chebyshev points converges spectrally.
    """
    points, values, past, weight, history = _collocation()
    elapsed = tau * points[:, None] * past
    kernel = _integrated_greens_function(elapsed) * weight * points[:, None] / tau
    operator = np.einsum("iq,iqj->ij", kernel, history)
    system = values + (alpha**2)[:, None, None] * operator
    series = np.linalg.solve(system, np.ones((alpha.size, _COLLOCATION, 1)))[..., 0]
    return series @ operator[-1]


def _pairs(alpha: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    return np.broadcast_arrays(np.asarray(alpha, float), np.asarray(second, float))


def _exact_loss(alpha: Array, tau: Array) -> Array:
    """(1 - zs) / alpha^2 for pairs (alpha, tau) of any common shape."""
    loss = np.empty(alpha.size)
    durations, which = np.unique(tau.ravel(), return_inverse=True)
    angles = alpha.ravel()
    for index, duration in enumerate(durations):
        chosen = which.ravel() == index
        loss[chosen] = _saturation_loss(angles[chosen], duration)
    return loss.reshape(alpha.shape)


def saturation(alpha: ArrayLike, tau: ArrayLike) -> Array:
    """zs of an isolated semi-solid pool at the end of a rectangular pulse that finds it at 1.

    Solves dz/dt = -w1^2 int_0^t G((t - s) / T2s) z(s) ds, the generalized Bloch equation on
    resonance without relaxation and exchange, to 1e-9.

    Parameters
    ----------
    alpha : (n,) or scalar
        Flip angle w1 t in rad, at most 4 pi in size.
    tau : (n,) or scalar
        Duration t of the pulse in units of T2s, in (0, 400].

    Returns
    -------
    (n,)
        zs at the end of each pulse. Pulses of one `tau` share most of the work.

    Raises
    ------
    ValueError
        If a flip angle or a duration lies outside these ranges or is not finite.

    References
    ----------
    Assländer et al. 2022 {cite}`asslander2022bloch`.
    """
    alpha, tau = _pairs(alpha, tau)
    _check("alpha", alpha, -_LARGEST_ANGLE, _LARGEST_ANGLE, "rad")
    _check("tau", tau, np.finfo(float).tiny, _LONGEST)
    return 1 - alpha**2 * _exact_loss(alpha, tau)


def lorentzian_saturation(alpha: ArrayLike, r: ArrayLike) -> Array:
    """zs of an isolated pool with a Lorentzian line at the end of a rectangular pulse.

    The Bloch equations x' = -R2 x + w1 z, z' = -w1 x from x = 0, z = 1 are those of a damped
    pendulum. Their closed form has a branch with oscillations (r < 2 alpha) and one without; both
    keep their digits where they meet.

    Parameters
    ----------
    alpha : (n,) or scalar
        Flip angle w1 t in rad.
    r : (n,) or scalar
        R2 t, not negative.

    Returns
    -------
    (n,)
        z at the end of each pulse; cos(alpha) for r = 0.

    Raises
    ------
    ValueError
        If `r` is negative, or either is not finite.
    """
    alpha, r = _pairs(alpha, r)
    _check("alpha", alpha, -np.inf, np.inf, "rad")
    _check("r", r, 0.0, np.inf)
    alpha = np.abs(alpha)
    half = r / 2
    discriminant = (half - alpha) * (half + alpha)
    root = np.sqrt(np.abs(discriminant))
    small = np.minimum(root, 1.0)
    divisor = np.where(small > 0, small, 1.0)
    sinhc = np.where(small > 0, np.sinh(small) / divisor, 1.0)
    oscillating = np.exp(-half) * (np.cos(root) + half * np.sinc(root / np.pi))
    critical = np.exp(-half) * (np.cosh(small) + half * sinhc)
    overdamped = 1 - alpha**2 * _overdamped_loss(alpha, half, np.maximum(root, 1.0))
    return np.where(discriminant < 0, oscillating, np.where(root < 1, critical, overdamped))


def _overdamped_loss(alpha: Array, half: Array, root: Array) -> Array:
    """(1 - z) / alpha^2 of the overdamped pool: accurate for all `alpha` down to 0.

    `half` is r / 2 and `root` the positive square root of half^2 - alpha^2.
    """
    total = root + half
    slow = alpha**2 / total  # root - half is -slow, without the cancellation
    decay = np.where(slow > 0, -np.expm1(-slow) / np.where(slow > 0, slow, 1.0), 1.0)
    return 0.5 * (total / root * decay + np.expm1(-total) / root) / total


def _lorentzian_loss(alpha: Array, r: Array) -> Array:
    """(1 - z) / alpha^2 of a Lorentzian pool, with its limit (r - 1 + exp(-r)) / r^2 at alpha 0."""
    half = r / 2
    root = np.sqrt(np.maximum((half - alpha) * (half + alpha), 0.0))
    # A pulse so strong that the pool is not well overdamped leaves 1 - z with all its digits,
    # unless alpha and r are both small, which no pulse in the range of the table is.
    easy = root > np.minimum(0.5, 0.5 * half)
    gentle = _overdamped_loss(alpha, half, np.where(easy, root, 1.0))
    strong = (1 - lorentzian_saturation(alpha, r)) / np.where(easy, 1.0, alpha**2)
    return np.where(easy, gentle, strong)


def _reachable_loss(alpha: Array, loss: Array) -> Array:
    """The loss (1 - z) / alpha^2 nearest to `loss` that a Lorentzian pool can suffer.

    zs is raised by _SOFT log(1 + exp(-distance / _SOFT)) with its distance from the lowest value a
    Lorentzian pool can reach, so that r stays smooth where the lowest value is passed.
    """
    depth = np.sqrt(np.maximum(alpha**2 - _TURN**2, 0.0))
    lowest = np.where(alpha < _TURN, np.cos(alpha), np.cos(_TURN) * np.exp(-depth) * (1 + depth))
    distance = 1 - alpha**2 * loss - lowest
    # below pi every value down to cos(alpha) is reached by some r, and none below it occurs
    raised = np.where(alpha < np.pi, 0.0, _SOFT * np.logaddexp(0.0, -distance / _SOFT))
    return loss - raised / np.where(alpha < np.pi, 1.0, alpha**2)


def matched_damping(alpha: ArrayLike, tau: ArrayLike) -> Array:
    """r = R2l t: the Lorentzian damping that leaves zs where the semi-solid pool's line leaves it.

    Where several dampings do, the largest is taken: it is the one that continues the weak
    pulse's, for which zs falls by alpha^2 (r - 1 + exp(-r)) / r^2. Where none does (see the head
    of this module), the one of the least difference.

    Parameters
    ----------
    alpha : (n,) or scalar
        Flip angle in rad, within `FLIP_ANGLE_RANGE`.
    tau : (n,) or scalar
        Duration of the pulse in units of T2s, within `TAU_RANGE`.

    Returns
    -------
    (n,)
        r; divide by the duration for the rate R2l in 1/s.

    Raises
    ------
    ValueError
        If a pair lies outside these ranges.

    References
    ----------
    Assländer et al. 2022 {cite}`asslander2022bloch`.
    """
    check_range(alpha, tau)
    alpha, tau = _pairs(alpha, tau)
    return _match(alpha, _reachable_loss(alpha, _exact_loss(alpha, tau)))


def _match(alpha: Array, target: Array) -> Array:
    """The largest r whose loss (1 - z) / alpha^2 is `target`, by bisection of log r."""
    # zs rises with r, from its lowest value on
    low = np.log(np.maximum(2 * np.sqrt(np.maximum(alpha**2 - _TURN**2, 0.0)), 1e-3))
    high = np.full_like(low, np.log(1e4))
    for _ in range(54):
        middle = (low + high) / 2
        too_weak = _lorentzian_loss(alpha, np.exp(middle)) > target
        low = np.where(too_weak, middle, low)
        high = np.where(too_weak, high, middle)
    return np.exp((low + high) / 2)


@lru_cache(maxsize=1)
def table() -> tuple[Array, float, float, float, float]:
    """The table `lookup` reads: pass it on as ``lookup(alpha, tau, *table())``.

    r / tau as a bicubic spline in alpha^2 and sqrt(tau), in which it is smooth and even in alpha.
    Built once, in less than a second, and kept.

    Returns
    -------
    coefficients : (cells + 3, cells + 3)
        Of the cubic B-splines on uniform knots, first axis alpha^2; read-only.
    per_angle, per_tau : float
        Cells per unit of alpha^2 and of sqrt(tau).
    first_angle, first_tau : float
        Where the first cell begins, in alpha^2 and in sqrt(tau).
    """
    first = (FLIP_ANGLE_RANGE[0] ** 2, TAU_RANGE[0] ** 0.5)
    last = (FLIP_ANGLE_RANGE[1] ** 2, TAU_RANGE[1] ** 0.5)
    squares, roots = (
        _spline_sites(begin, end, cells)
        for begin, end, cells in zip(first, last, _CELLS, strict=True)
    )
    alpha, tau = np.meshgrid(np.sqrt(squares), roots**2, indexing="ij")
    ratio = _match(alpha, _reachable_loss(alpha, _interpolated_loss(squares, roots))) / tau
    steps = [(e - b) / cells for b, e, cells in zip(first, last, _CELLS, strict=True)]
    knots = [
        begin + step * np.arange(-3, cells + 4)
        for begin, step, cells in zip(first, steps, _CELLS, strict=True)
    ]
    in_angle = make_interp_spline(squares, ratio, k=3, t=knots[0]).c
    coefficients = np.ascontiguousarray(make_interp_spline(roots, in_angle.T, t=knots[1]).c.T)
    coefficients.setflags(write=False)
    return coefficients, 1 / steps[0], 1 / steps[1], first[0], first[1]


def _interpolated_loss(squares: Array, roots: Array) -> Array:
    """(1 - zs) / alpha^2 on a grid of alpha^2 and sqrt(tau), from a few exact values, to 1e-9.

    Unlike r it is smooth everywhere, so a polynomial in alpha^2 and log(tau) has all its digits.
    """
    nodes = np.polynomial.chebyshev.chebpts1(_NODES)
    spans = (np.square(FLIP_ANGLE_RANGE), np.log(TAU_RANGE))
    alpha = np.sqrt(spans[0].mean() + np.ptp(spans[0]) / 2 * nodes)
    tau = np.exp(spans[1].mean() + np.ptp(spans[1]) / 2 * nodes)
    loss = _exact_loss(*np.meshgrid(alpha, tau, indexing="ij"))
    for span, wanted in zip(spans, (squares, 2 * np.log(roots)), strict=True):
        basis = np.polynomial.chebyshev.chebvander
        series = np.linalg.solve(basis(nodes, _NODES - 1), loss)
        # the grid's axis moves last, so that the other one comes first in the next round
        loss = (basis(2 * (wanted - span.mean()) / np.ptp(span), _NODES - 1) @ series).T
    return loss


def _spline_sites(first: float, last: float, cells: int) -> Array:
    """Where a cubic spline on `cells` uniform cells is told its values: the knots and two more."""
    knots = np.linspace(first, last, cells + 1)
    ends = [(knots[0] + knots[1]) / 2, (knots[-2] + knots[-1]) / 2]
    return np.sort(np.concatenate([knots, ends]))


@njit(cache=True)
def lookup(alpha, tau, coefficients, per_angle, per_tau, first_angle, first_tau):
    """r = R2l t and its derivatives, from the table: for use inside compiled code.

    Parameters
    ----------
    alpha, tau : float
        Flip angle in rad and duration in units of T2s. Nothing is checked here: call
        `check_range` first; outside, the outermost cell is extrapolated.
    coefficients, per_angle, per_tau, first_angle, first_tau
        The entries of `table`.

    Returns
    -------
    r, dr_dalpha, dr_dtau : float
        r and the exact derivatives of the interpolated r. r has two continuous derivatives.
        The zs that follows from it is right to 1e-6 for alpha up to 1.4 pi.
    """
    root_tau = np.sqrt(tau)
    x = (alpha * alpha - first_angle) * per_angle
    y = (root_tau - first_tau) * per_tau
    # the comparisons send NaN to the first cell: no read outside the table, and NaN comes out
    row = int(min(x, coefficients.shape[0] - 4.0)) if x > 0.0 else 0
    column = int(min(y, coefficients.shape[1] - 4.0)) if y > 0.0 else 0
    x -= row
    y -= column

    # cubic B-splines and their derivatives on a unit cell
    u = 1.0 - x
    x2 = x * x
    u2 = u * u
    a0 = u2 * u * (1.0 / 6.0)
    a3 = x2 * x * (1.0 / 6.0)
    a1 = (2.0 / 3.0) - x2 * (1.0 - 0.5 * x)
    a2 = (2.0 / 3.0) - u2 * (1.0 - 0.5 * u)
    p0 = -0.5 * u2
    p3 = 0.5 * x2
    p1 = x * (1.5 * x - 2.0)
    p2 = u * (2.0 - 1.5 * u)

    v = 1.0 - y
    y2 = y * y
    v2 = v * v
    b0 = v2 * v * (1.0 / 6.0)
    b3 = y2 * y * (1.0 / 6.0)
    b1 = (2.0 / 3.0) - y2 * (1.0 - 0.5 * y)
    b2 = (2.0 / 3.0) - v2 * (1.0 - 0.5 * v)
    q0 = -0.5 * v2
    q3 = 0.5 * y2
    q1 = y * (1.5 * y - 2.0)
    q2 = v * (2.0 - 1.5 * v)

    ratio = 0.0
    by_square = 0.0
    by_root = 0.0
    for a, p, i in ((a0, p0, 0), (a1, p1, 1), (a2, p2, 2), (a3, p3, 3)):
        c0 = coefficients[row + i, column]
        c1 = coefficients[row + i, column + 1]
        c2 = coefficients[row + i, column + 2]
        c3 = coefficients[row + i, column + 3]
        along = b0 * c0 + b1 * c1 + b2 * c2 + b3 * c3
        ratio += a * along
        by_square += p * along
        by_root += a * (q0 * c0 + q1 * c1 + q2 * c2 + q3 * c3)
    dr_dalpha = tau * by_square * per_angle * 2.0 * alpha
    dr_dtau = ratio + 0.5 * root_tau * by_root * per_tau
    return tau * ratio, dr_dalpha, dr_dtau


def check_range(alpha: ArrayLike, tau: ArrayLike) -> None:
    """Refuse pulses the table of R2l does not cover.

    Parameters
    ----------
    alpha : (n,) or scalar
        Flip angles in rad, B1 included.
    tau : (n,) or scalar
        Durations in units of T2s.

    Raises
    ------
    ValueError
        If a flip angle lies outside `FLIP_ANGLE_RANGE`, a duration outside `TAU_RANGE`, or either
        is not finite. The message names the value and the range.
    """
    _check("alpha", np.asarray(alpha, float), *FLIP_ANGLE_RANGE, "rad (B1 times flip angle)")
    _check("tau", np.asarray(tau, float), *TAU_RANGE, "(pulse duration over T2s)")


def _check(name: str, values: Array, lowest: float, highest: float, unit: str = "") -> None:
    wrong = ~(np.isfinite(values) & (values >= lowest) & (values <= highest))
    if wrong.any():
        raise ValueError(
            f"{name} is {float(values[wrong][0]):g}, expected finite values in "
            f"[{lowest:g}, {highest:g}] {unit}".rstrip()
        )
