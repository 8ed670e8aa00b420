"""Compiled Bloch simulation of two pools through a repeated train of pulses.

Per pulse the magnetization obeys linear differential equations with constant coefficients,

    xf' = -R2f xf - B0 yf + w1 zf
    yf' =  B0 xf - R2f yf
    zf' = -w1 xf - (R1 + Rx m0s) zf + Rx m0f zs + R1 m0f
    xs' = -R2l xs + w1 zs
    zs' = -w1 xs + Rx m0s zf - (R1 + Rx m0f) zs + R1 m0s

where R2l is the linear approximation of the generalized Bloch equations
{cite}`asslander2022bloch` (see :mod:`qmri.mt.lineshape`). Between pulses w1 = 0, the solution
is in closed form, and the transverse magnetization of the semi-solid pool is gone.

Three ideas make it fast:

- The exponential of a pulse is applied to vectors by its Chebyshev series over [-R2l t, 0],
  where the fast decay of the semi-solid pool lies: 20 to 40 products with a sparse matrix,
  exact to rounding, however stiff.
- One pass carries the four unit vectors and the equilibrium through the train. What comes out
  gives the periodic steady state as the solution of four equations, and every signal as a
  product with it: no repetition until the transient has died.
- Sixteen tissues go side by side through the same instructions, as the processor likes it.

Derivatives are carried along as tangents of the same recursion: exact, not differences.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numba import njit, prange
from scipy.special import ive

from qmri.mt import lineshape

__all__ = ["PARAMETERS", "simulate", "simulate_with_jacobian"]

PARAMETERS = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
W = 16  # tissues side by side: a few vector registers full

# Places in the workspace, each W wide: Chebyshev vectors (current, previous), accumulated sum,
# coefficients of one pulse, their derivatives by one parameter.
_XF, _YF, _ZF, _XS, _ZS = (W * k for k in range(5))
_PXF, _PYF, _PZF, _PXS, _PZS = (W * k for k in range(5, 10))
_AXF, _AYF, _AZF, _AZS = (W * k for k in range(10, 14))
_DF, _OF, _OM, _DZ, _E1, _CF, _DS, _E2, _DZS, _CS = (W * k for k in range(14, 24))
_G_DF, _G_OF, _G_OM, _G_DZ, _G_E1, _G_CF, _G_DS, _G_E2, _G_DZS, _G_CS = (
    W * k for k in range(24, 34)
)
# Tissue, rates.
_M0S, _R1, _R2F, _RX, _T2S, _B0, _B1 = (W * k for k in range(34, 41))
# Linear rate of the pulse and its derivatives.
_R2L, _R2L_T2S, _R2L_B1 = (W * k for k in range(41, 44))
_SIZE = 44 * W
_STATE = 5 * W  # one Chebyshev vector
_FREE = 5  # numbers of one free interval: real and imaginary part, R1, R1 + Rx, its length

_STEP = 1.0  # spacing of the tables' decay
_TURN = 0.25  # and of their rotation
_DECAYS, _TURNS, _TERMS = 400, 80, 400
_NEGLIGIBLE = 1e-14
# Multiplications and additions may be fused: the last digit then differs between processors.
_lanes = njit(cache=True, error_model="numpy", fastmath={"contract"})


@lru_cache
def _chebyshev() -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (decay, term) of exp on [-decay, 0], and how many are needed (decay, turn).

    Eigenvalues leave the real axis by the angle that the pulse turns; there the polynomials
    grow with the ellipse through that point.
    """
    order = np.arange(_TERMS)
    half = _STEP * np.arange(1, _DECAYS + 1)[:, np.newaxis] / 2
    coefficients = 2 * ive(order, half)
    coefficients[:, 0] /= 2
    turn = _TURN * np.arange(1, _TURNS + 1) / half
    growth = np.log(turn + np.hypot(1, turn))[:, :, np.newaxis] * order
    with np.errstate(divide="ignore"):
        size = np.log(coefficients)[:, np.newaxis, :] + growth
    needed = size > math.log(_NEGLIGIBLE)
    terms = _TERMS - needed[:, :, ::-1].argmax(axis=2)
    return coefficients, terms.astype(np.int64)


@njit(cache=True, error_model="numpy")
def _prepare_pulse(w, angle, duration, table, terms):
    """Coefficients of one pulse; returns the row of the series and the number of its terms."""
    values, per_angle, per_tau, first_angle, first_tau = table
    decay, turn = 0.0, 0.0
    for k in range(W):
        alpha = w[_B1 + k] * angle
        r, r_alpha, r_tau = lineshape.lookup(
            alpha, duration / w[_T2S + k], values, per_angle, per_tau, first_angle, first_tau
        )
        w[_R2L + k] = r / duration
        w[_R2L_T2S + k] = -r_tau / w[_T2S + k] ** 2
        w[_R2L_B1 + k] = r_alpha * angle / duration
        rates = w[_R1 + k] + w[_RX + k]
        decay = max(decay, max(r, w[_R2F + k] * duration) + 2 * rates * duration)
        turn = max(turn, math.hypot(alpha, w[_B0 + k] * duration) + rates * duration)
    row = int(decay / _STEP)
    column = int(turn / _TURN)
    if row >= terms.shape[0] or column >= terms.shape[1]:
        raise ValueError("a pulse turns or decays beyond what the simulator is made for")
    scale = 4.0 * duration / (_STEP * (row + 1))
    for k in range(W):
        m0s, r1, rx = w[_M0S + k], w[_R1 + k], w[_RX + k]
        m0f = 1.0 - m0s
        w[_DF + k] = 2.0 - scale * w[_R2F + k]
        w[_OF + k] = scale * w[_B0 + k]
        w[_OM + k] = scale * w[_B1 + k] * angle / duration
        w[_DZ + k] = 2.0 - scale * (r1 + rx * m0s)
        w[_E1 + k] = scale * rx * m0f
        w[_CF + k] = scale * r1 * m0f
        w[_DS + k] = 2.0 - scale * w[_R2L + k]
        w[_E2 + k] = scale * rx * m0s
        w[_DZS + k] = 2.0 - scale * (r1 + rx * m0f)
        w[_CS + k] = scale * r1 * m0s
    return row, terms[row, column], scale


@_lanes
def _first(w, c0, c1, unit):
    """Terms 0 and 1 of the series for the vector in the workspace, without source."""
    for k in range(W):
        xf, yf, zf, zs = w[_XF + k], w[_YF + k], w[_ZF + k], w[_ZS + k]
        w[_PXF + k], w[_PYF + k], w[_PZF + k], w[_PXS + k], w[_PZS + k] = xf, yf, zf, 0.0, zs
        nxf = 0.5 * (w[_DF + k] * xf - w[_OF + k] * yf + w[_OM + k] * zf)
        nyf = 0.5 * (w[_OF + k] * xf + w[_DF + k] * yf)
        nzf = 0.5 * (w[_DZ + k] * zf - w[_OM + k] * xf + w[_E1 + k] * zs + w[_CF + k] * unit)
        nxs = 0.5 * w[_OM + k] * zs
        nzs = 0.5 * (w[_E2 + k] * zf + w[_DZS + k] * zs + w[_CS + k] * unit)
        w[_XF + k], w[_YF + k], w[_ZF + k], w[_XS + k], w[_ZS + k] = nxf, nyf, nzf, nxs, nzs
        w[_AXF + k] = c0 * xf + c1 * nxf
        w[_AYF + k] = c0 * yf + c1 * nyf
        w[_AZF + k] = c0 * zf + c1 * nzf
        w[_AZS + k] = c0 * zs + c1 * nzs


@_lanes
def _next(w, c, unit):
    """The next term of the series, without source."""
    for k in range(W):
        xf, yf, zf, xs, zs = w[_XF + k], w[_YF + k], w[_ZF + k], w[_XS + k], w[_ZS + k]
        nxf = w[_DF + k] * xf - w[_OF + k] * yf + w[_OM + k] * zf - w[_PXF + k]
        nyf = w[_OF + k] * xf + w[_DF + k] * yf - w[_PYF + k]
        nzf = w[_DZ + k] * zf - w[_OM + k] * xf + w[_E1 + k] * zs + w[_CF + k] * unit - w[_PZF + k]
        nxs = w[_DS + k] * xs + w[_OM + k] * zs - w[_PXS + k]
        nzs = w[_E2 + k] * zf - w[_OM + k] * xs + w[_DZS + k] * zs + w[_CS + k] * unit - w[_PZS + k]
        w[_PXF + k], w[_PYF + k], w[_PZF + k], w[_PXS + k], w[_PZS + k] = xf, yf, zf, xs, zs
        w[_XF + k], w[_YF + k], w[_ZF + k], w[_XS + k], w[_ZS + k] = nxf, nyf, nzf, nxs, nzs
        w[_AXF + k] += c * nxf
        w[_AYF + k] += c * nyf
        w[_AZF + k] += c * nzf
        w[_AZS + k] += c * nzs


@njit(cache=True, error_model="numpy")
def _take_sum(w):
    for k in range(W):
        w[_XF + k], w[_YF + k] = w[_AXF + k], w[_AYF + k]
        w[_ZF + k], w[_ZS + k] = w[_AZF + k], w[_AZS + k]


@njit(cache=True, error_model="numpy")
def _pulse(w, coefficients, terms, unit):
    """The vector in the workspace after the pulse; `unit` is 1 where it includes equilibrium."""
    _first(w, coefficients[0], coefficients[1], unit)
    for term in range(2, terms):
        _next(w, coefficients[term], unit)
    _take_sum(w)


@njit(cache=True, error_model="numpy")
def _pulse_recorded(w, coefficients, terms, sequence):
    """As `_pulse` with equilibrium, keeping every Chebyshev vector for the tangents."""
    for k in range(_STATE):
        sequence[0, k] = w[k]
    for k in range(W):
        sequence[0, _XS + k] = 0.0
    _first(w, coefficients[0], coefficients[1], 1.0)
    for k in range(_STATE):
        sequence[1, k] = w[k]
    for term in range(2, terms):
        _next(w, coefficients[term], 1.0)
        for k in range(_STATE):
            sequence[term, k] = w[k]
    _take_sum(w)


@njit(cache=True, error_model="numpy")
def _derive_pulse(w, scale, angle, duration, p):
    """Derivatives of the coefficients of one pulse by parameter `p`."""
    for k in range(10 * W):
        w[_G_DF + k] = 0.0
    for k in range(W):
        m0s, r1, rx = w[_M0S + k], w[_R1 + k], w[_RX + k]
        m0f = 1.0 - m0s
        if p == 0:
            w[_G_DZ + k] = w[_G_E1 + k] = -scale * rx
            w[_G_E2 + k] = w[_G_DZS + k] = scale * rx
            w[_G_CF + k], w[_G_CS + k] = -scale * r1, scale * r1
        elif p == 1:
            w[_G_DZ + k] = w[_G_DZS + k] = -scale
            w[_G_CF + k], w[_G_CS + k] = scale * m0f, scale * m0s
        elif p == 2:
            w[_G_DF + k] = -scale
        elif p == 3:
            w[_G_DZ + k], w[_G_E1 + k] = -scale * m0s, scale * m0f
            w[_G_E2 + k], w[_G_DZS + k] = scale * m0s, -scale * m0f
        elif p == 4:
            w[_G_DS + k] = -scale * w[_R2L_T2S + k]
        elif p == 5:
            w[_G_OF + k] = scale
        else:
            w[_G_OM + k] = scale * angle / duration
            w[_G_DS + k] = -scale * w[_R2L_B1 + k]


@_lanes
def _next_tangent(w, state, factor, c):
    """The next term of the series of a tangent, driven by the state's term before it."""
    for k in range(W):
        xf, yf, zf, xs, zs = w[_XF + k], w[_YF + k], w[_ZF + k], w[_XS + k], w[_ZS + k]
        sxf, syf, szf = state[_XF + k], state[_YF + k], state[_ZF + k]
        sxs, szs = state[_XS + k], state[_ZS + k]
        df, of, om = w[_G_DF + k], w[_G_OF + k], w[_G_OM + k]
        nxf = w[_DF + k] * xf - w[_OF + k] * yf + w[_OM + k] * zf + df * sxf - of * syf + om * szf
        nyf = w[_OF + k] * xf + w[_DF + k] * yf + of * sxf + df * syf
        nzf = w[_DZ + k] * zf - w[_OM + k] * xf + w[_E1 + k] * zs
        nzf += w[_G_DZ + k] * szf - om * sxf + w[_G_E1 + k] * szs + w[_G_CF + k]
        nxs = w[_DS + k] * xs + w[_OM + k] * zs + w[_G_DS + k] * sxs + om * szs
        nzs = w[_E2 + k] * zf - w[_OM + k] * xs + w[_DZS + k] * zs
        nzs += w[_G_E2 + k] * szf - om * sxs + w[_G_DZS + k] * szs + w[_G_CS + k]
        nxf = factor * nxf - w[_PXF + k]
        nyf = factor * nyf - w[_PYF + k]
        nzf = factor * nzf - w[_PZF + k]
        nxs = factor * nxs - w[_PXS + k]
        nzs = factor * nzs - w[_PZS + k]
        w[_PXF + k], w[_PYF + k], w[_PZF + k], w[_PXS + k], w[_PZS + k] = xf, yf, zf, xs, zs
        w[_XF + k], w[_YF + k], w[_ZF + k], w[_XS + k], w[_ZS + k] = nxf, nyf, nzf, nxs, nzs
        w[_AXF + k] += c * nxf
        w[_AYF + k] += c * nyf
        w[_AZF + k] += c * nzf
        w[_AZS + k] += c * nzs


@njit(cache=True, error_model="numpy")
def _pulse_tangent(w, coefficients, terms, sequence):
    """The tangent in the workspace after the pulse whose vectors `sequence` holds."""
    c0 = coefficients[0]
    for k in range(W):
        w[_XS + k] = 0.0
        w[_AXF + k], w[_AYF + k] = c0 * w[_XF + k], c0 * w[_YF + k]
        w[_AZF + k], w[_AZS + k] = c0 * w[_ZF + k], c0 * w[_ZS + k]
    for k in range(5 * W):
        w[_PXF + k] = 0.0
    for term in range(1, terms):
        _next_tangent(w, sequence[term - 1], 0.5 if term == 1 else 1.0, coefficients[term])
    _take_sum(w)


@njit(cache=True, error_model="numpy")
def _prepare_free(w, times, free):
    """Factors of each different free interval, (intervals, _FREE * W)."""
    for j in range(times.shape[0]):
        t = times[j]
        for k in range(W):
            fade = math.exp(-w[_R2F + k] * t)
            free[j, k] = fade * math.cos(w[_B0 + k] * t)
            free[j, W + k] = fade * math.sin(w[_B0 + k] * t)
            free[j, 2 * W + k] = math.exp(-w[_R1 + k] * t)
            free[j, 3 * W + k] = math.exp(-(w[_R1 + k] + w[_RX + k]) * t)
            free[j, 4 * W + k] = t


@_lanes
def _relax(w, f, unit):
    """Free precession, relaxation and exchange over one interval."""
    for k in range(W):
        xf, yf, zf, zs = w[_XF + k], w[_YF + k], w[_ZF + k], w[_ZS + k]
        m0s = w[_M0S + k]
        total = unit + f[2 * W + k] * (zf + zs - unit)
        exchanged = f[3 * W + k] * (m0s * zf - (1.0 - m0s) * zs)
        w[_XF + k] = f[k] * xf - f[W + k] * yf
        w[_YF + k] = f[W + k] * xf + f[k] * yf
        w[_ZF + k] = (1.0 - m0s) * total + exchanged
        w[_ZS + k] = m0s * total - exchanged


@_lanes
def _relax_tangent(w, f, m, p):
    """The same for a tangent; m holds the state before the interval."""
    by_m0s, by_r1, by_r2f = 1.0 * (p == 0), 1.0 * (p == 1), 1.0 * (p == 2)
    by_rate, by_b0 = 1.0 * (p == 1 or p == 3), 1.0 * (p == 5)
    for k in range(W):
        xf, yf, zf, zs = w[_XF + k], w[_YF + k], w[_ZF + k], w[_ZS + k]
        c, s, e1, e2, t = f[k], f[W + k], f[2 * W + k], f[3 * W + k], f[4 * W + k]
        m0s = w[_M0S + k]
        m0f = 1.0 - m0s
        mz, mzs = m[_ZF + k], m[_ZS + k]
        mx = t * (c * m[_XF + k] - s * m[_YF + k])
        my = t * (s * m[_XF + k] + c * m[_YF + k])
        away = e1 * (mz + mzs - 1.0)
        total = e1 * (zf + zs) - by_r1 * t * away
        exchanged = e2 * (m0s * zf - m0f * zs + by_m0s * (mz + mzs))
        exchanged -= by_rate * t * e2 * (m0s * mz - m0f * mzs)
        more = by_m0s * (1.0 + away)
        w[_XF + k] = c * xf - s * yf - by_r2f * mx - by_b0 * my
        w[_YF + k] = s * xf + c * yf - by_r2f * my + by_b0 * mx
        w[_ZF + k] = m0f * total + exchanged - more
        w[_ZS + k] = m0s * total - exchanged + more


@_lanes
def _turn(w, cosine, sine):
    for k in range(W):
        xf, yf = w[_XF + k], w[_YF + k]
        w[_XF + k] = cosine * xf - sine * yf
        w[_YF + k] = sine * xf + cosine * yf


@njit(cache=True, error_model="numpy")
def _copy(source, target, size):
    for k in range(size):
        target[k] = source[k]


# The inversion pulse lies between two equal crushers, which turn the transverse magnetization of
# each place by its own angle before the pulse and again after it. What survives the mean over
# all angles is linear in exp(i angle) and exp(2 i angle): three angles average it exactly. The
# pulse turns about the x axis, a quarter turn from the others.
_SPOILED = np.arange(3) * 2 * math.pi / 3
_BEFORE = np.stack([np.cos(_SPOILED - math.pi / 2), np.sin(_SPOILED - math.pi / 2)], axis=1)
_AFTER = np.stack([np.cos(_SPOILED + math.pi / 2), np.sin(_SPOILED + math.pi / 2)], axis=1)


@njit(cache=True, error_model="numpy")
def _solve(matrix, right):
    """Solve 4 equations in place, for several right-hand sides (4, n), with row pivoting."""
    n = right.shape[1]
    for c in range(4):
        best = c
        for r in range(c + 1, 4):
            if abs(matrix[r, c]) > abs(matrix[best, c]):
                best = r
        if best != c:
            for j in range(4):
                matrix[c, j], matrix[best, j] = matrix[best, j], matrix[c, j]
            for j in range(n):
                right[c, j], right[best, j] = right[best, j], right[c, j]
        for r in range(4):
            if r != c:
                ratio = matrix[r, c] / matrix[c, c]
                for j in range(c, 4):
                    matrix[r, j] -= ratio * matrix[c, j]
                for j in range(n):
                    right[r, j] -= ratio * right[c, j]
    for c in range(4):
        for j in range(n):
            right[c, j] /= matrix[c, c]


@njit(cache=True, error_model="numpy")
def _load_tissue(w, theta, first):
    last = theta.shape[0] - 1
    for k in range(W):
        row = min(first + k, last)
        w[_M0S + k] = theta[row, 0]
        w[_R1 + k] = 1.0 / theta[row, 1]
        w[_R2F + k] = 1.0 / theta[row, 2]
        w[_RX + k] = theta[row, 3]
        w[_T2S + k] = theta[row, 4]
        w[_B0 + k] = theta[row, 5]
        w[_B1 + k] = theta[row, 6]


_ROWS = np.array([_XF, _YF, _ZF, _ZS])


@njit(cache=True, error_model="numpy")
def _columns_through_train(w, columns, angles, durations, free, which, series, terms, table, xy):
    """Unit vectors and equilibrium through the whole train.

    `columns` (5, _STATE) ends as what they have become, `xy` (pulses, 5, 2 W) gets their
    transverse part at each echo.
    """
    start, total = np.empty(_STATE), np.empty(_STATE)
    for c in range(5):
        for k in range(_STATE):
            columns[c, k] = 0.0
        if c < 4:
            for k in range(W):
                columns[c, _ROWS[c] + k] = 1.0
    for i in range(angles.shape[0]):
        row, count, _ = _prepare_pulse(w, angles[i], durations[i], table, terms)
        coefficients = series[row]
        f = free[which[i]]
        for c in range(5):
            unit = 1.0 if c == 4 else 0.0
            _copy(columns[c], w, _STATE)
            _relax(w, f, unit)
            _turn(w, -1.0, 0.0)
            if i == 0:
                _copy(w, start, _STATE)
                for k in range(_STATE):
                    total[k] = 0.0
                for j in range(3):
                    _copy(start, w, _STATE)
                    _turn(w, _BEFORE[j, 0], _BEFORE[j, 1])
                    _pulse(w, coefficients, count, unit)
                    _turn(w, _AFTER[j, 0], _AFTER[j, 1])
                    for k in range(_STATE):
                        total[k] += w[k] / 3.0
                _copy(total, w, _STATE)
            else:
                _pulse(w, coefficients, count, unit)
            _relax(w, f, unit)
            _copy(w, columns[c], _STATE)
            _copy(w, xy[i, c], 2 * W)


@njit(cache=True, error_model="numpy")
def _steady_state(columns, start):
    """The state that the train reproduces, into start (_STATE), for each of the W tissues."""
    matrix, right = np.empty((4, 4)), np.empty((4, 1))
    for k in range(W):
        for r in range(4):
            for c in range(4):
                matrix[r, c] = (1.0 if r == c else 0.0) - columns[c, _ROWS[r] + k]
            right[r, 0] = columns[4, _ROWS[r] + k]
        _solve(matrix, right)
        for r in range(4):
            start[_ROWS[r] + k] = right[r, 0]


@njit(cache=True, parallel=True, error_model="numpy")
def _signals(theta, angles, durations, times, which, series, terms, table, signal):
    pulses = angles.shape[0]
    for group in prange((theta.shape[0] + W - 1) // W):
        w = np.zeros(_SIZE)
        start = np.zeros(_STATE)
        columns = np.empty((5, _STATE))
        free = np.empty((times.shape[0], _FREE * W))
        xy = np.empty((pulses, 5, 2 * W))
        _load_tissue(w, theta, group * W)
        _prepare_free(w, times, free)
        _columns_through_train(w, columns, angles, durations, free, which, series, terms, table, xy)
        _steady_state(columns, start)
        used = min(W, theta.shape[0] - group * W)
        for i in range(pulses):
            for k in range(used):
                x, y = xy[i, 4, k], xy[i, 4, W + k]
                for c in range(4):
                    m = start[_ROWS[c] + k]
                    x += xy[i, c, k] * m
                    y += xy[i, c, W + k] * m
                signal[group * W + k, i] = complex(x, y)


@njit(cache=True, parallel=True, error_model="numpy")
def _signals_and_jacobians(
    theta, angles, durations, times, which, series, terms, table, signal, jacobian
):
    """`jacobian` (tissues, 7, pulses), by m0s, R1, R2f, Rx, T2s, B0, B1."""
    pulses = angles.shape[0]
    for group in prange((theta.shape[0] + W - 1) // W):
        w = np.zeros(_SIZE)
        m, start, total, before = (
            np.zeros(_STATE), np.zeros(_STATE), np.zeros(_STATE), np.zeros(_STATE),
        )  # fmt: skip
        columns = np.empty((5, _STATE))
        tangents = np.zeros((7, _STATE))
        entering = np.zeros((7, _STATE))
        free = np.empty((times.shape[0], _FREE * W))
        xy = np.empty((pulses, 5, 2 * W))
        dxy = np.empty((pulses, 7, 2 * W))
        sequences = np.empty((3, series.shape[1], _STATE))
        _load_tissue(w, theta, group * W)
        _prepare_free(w, times, free)
        _columns_through_train(w, columns, angles, durations, free, which, series, terms, table, xy)
        _steady_state(columns, m)
        _copy(m, start, _STATE)
        for i in range(pulses):
            angle, duration = angles[i], durations[i]
            row, count, scale = _prepare_pulse(w, angle, duration, table, terms)
            coefficients = series[row]
            f = free[which[i]]
            copies = 3 if i == 0 else 1
            # Tangents of the interval before the pulse need the state that enters it.
            for p in range(7):
                _copy(tangents[p], w, _STATE)
                _relax_tangent(w, f, m, p)
                _turn(w, -1.0, 0.0)
                _copy(w, entering[p], _STATE)
            _copy(m, w, _STATE)
            _relax(w, f, 1.0)
            _turn(w, -1.0, 0.0)
            _copy(w, before, _STATE)
            for k in range(_STATE):
                total[k] = 0.0
            for j in range(copies):
                _copy(before, w, _STATE)
                if copies == 3:
                    _turn(w, _BEFORE[j, 0], _BEFORE[j, 1])
                _pulse_recorded(w, coefficients, count, sequences[j])
                if copies == 3:
                    _turn(w, _AFTER[j, 0], _AFTER[j, 1])
                for k in range(_STATE):
                    total[k] += w[k] / copies
            _copy(total, m, _STATE)  # after the pulse, before the second interval
            for p in range(7):
                for k in range(_STATE):
                    total[k] = 0.0
                _derive_pulse(w, scale, angle, duration, p)
                for j in range(copies):
                    _copy(entering[p], w, _STATE)
                    if copies == 3:
                        _turn(w, _BEFORE[j, 0], _BEFORE[j, 1])
                    _pulse_tangent(w, coefficients, count, sequences[j])
                    if copies == 3:
                        _turn(w, _AFTER[j, 0], _AFTER[j, 1])
                    for k in range(_STATE):
                        total[k] += w[k] / copies
                _copy(total, w, _STATE)
                _relax_tangent(w, f, m, p)
                _copy(w, tangents[p], _STATE)
                _copy(w, dxy[i, p], 2 * W)
            _copy(m, w, _STATE)
            _relax(w, f, 1.0)
            _copy(w, m, _STATE)
        # The start of the train moves with the parameters, too.
        used = min(W, theta.shape[0] - group * W)
        matrix, right = np.empty((4, 4)), np.empty((4, 7))
        moved = np.empty((4, 7, W))
        for k in range(used):
            for r in range(4):
                for c in range(4):
                    matrix[r, c] = (1.0 if r == c else 0.0) - columns[c, _ROWS[r] + k]
                for p in range(7):
                    right[r, p] = tangents[p, _ROWS[r] + k]
            _solve(matrix, right)
            for r in range(4):
                for p in range(7):
                    moved[r, p, k] = right[r, p]
        for k in range(used):
            n = group * W + k
            for i in range(pulses):
                x, y = xy[i, 4, k], xy[i, 4, W + k]
                for c in range(4):
                    s = start[_ROWS[c] + k]
                    x += xy[i, c, k] * s
                    y += xy[i, c, W + k] * s
                signal[n, i] = complex(x, y)
                for p in range(7):
                    x, y = dxy[i, p, k], dxy[i, p, W + k]
                    for c in range(4):
                        x += xy[i, c, k] * moved[c, p, k]
                        y += xy[i, c, W + k] * moved[c, p, k]
                    jacobian[n, p, i] = complex(x, y)


def _train_arrays(train) -> tuple:
    free = (train.repetition_time - train.durations) / 2
    times, which = np.unique(free, return_inverse=True)
    return train.flip_angles, train.durations, times, which.astype(np.int64)


def simulate(train, theta: np.ndarray) -> np.ndarray:
    """Signals of checked tissue, (tissues, 7) -> (tissues, pulses) complex."""
    signal = np.empty((len(theta), len(train.flip_angles)), dtype=np.complex128)
    _signals(theta, *_train_arrays(train), *_chebyshev(), lineshape.table(), signal)
    return signal


def simulate_with_jacobian(train, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signals (tissues, pulses), and their derivatives (tissues, 7, pulses) by `PARAMETERS`."""
    shape = (len(theta), len(train.flip_angles))
    signal = np.empty(shape, dtype=np.complex128)
    jacobian = np.empty((shape[0], 7, shape[1]), dtype=np.complex128)
    _signals_and_jacobians(
        theta, *_train_arrays(train), *_chebyshev(), lineshape.table(), signal, jacobian
    )
    for p in (1, 2):  # rates to times
        jacobian[:, p] *= (-1.0 / theta[:, p] ** 2)[:, np.newaxis]
    return signal, jacobian
