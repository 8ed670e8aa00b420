"""What a pulse does to the semi-solid pool: limits, closed forms and brute force."""

import numpy as np
import pytest
from numba import njit
from scipy.integrate import quad, solve_ivp

from qmri.mt.lineshape import (
    FLIP_ANGLE_RANGE,
    TAU_RANGE,
    check_range,
    greens_function,
    lookup,
    lorentzian_saturation,
    matched_damping,
    saturation,
    table,
)

# A Lorentzian pool can follow the super-Lorentzian one up to here, whatever the duration.
ALWAYS_MATCHED = 1.4 * np.pi


@njit
def _lookup_all(alpha, tau, coefficients, per_angle, per_tau, first_angle, first_tau):
    found = np.empty((alpha.size, 3))
    for i in range(alpha.size):
        r, by_alpha, by_tau = lookup(
            alpha[i], tau[i], coefficients, per_angle, per_tau, first_angle, first_tau
        )
        found[i, 0], found[i, 1], found[i, 2] = r, by_alpha, by_tau
    return found


def _pulses(count, largest, seed):
    rng = np.random.default_rng(seed)
    alpha = rng.uniform(FLIP_ANGLE_RANGE[0], largest, count)
    return alpha, np.exp(rng.uniform(*np.log(TAU_RANGE), count))


# the line


def test_all_magnetisation_is_there_at_first():
    np.testing.assert_allclose(greens_function([0.0]), 1.0, atol=1e-13)


def test_line_begins_as_its_moments_say():
    # the mean of (3 z^2 - 1)^2 over the sphere is 4/5, that of its square 48/35
    k = np.array([0.02, 0.05, 0.1])
    series = 1 - k**2 / 10 + 3 * k**4 / 280
    np.testing.assert_allclose(greens_function(k), series, atol=2e-9)


@pytest.mark.parametrize("k", [0.5, 3.0, 30.0, 400.0])
def test_line_against_adaptive_quadrature(k):
    magic = 1 / np.sqrt(3)
    near = [magic - 3 / k, magic - 0.3 / k, magic, magic + 0.3 / k, magic + 3 / k]
    expected, _ = quad(
        lambda z: np.exp(-(k**2) * (3 * z**2 - 1) ** 2 / 8),
        0,
        1,
        points=[z for z in near if 0 < z < 1],
        epsabs=1e-13,
        epsrel=1e-12,
        limit=200,
    )
    np.testing.assert_allclose(greens_function([k]), expected, atol=1e-10)


def test_tail_is_that_of_the_magic_angle():
    # Near z = 1/sqrt(3) the exponent is -3/2 k^2 (z - 1/sqrt(3))^2, a Gaussian of area
    # sqrt(2 pi / 3) / k: the tail falls as slowly as 1/k. The next term is of order 1/k^2 smaller.
    k = np.array([100.0, 400.0])
    np.testing.assert_allclose(k * greens_function(k), np.sqrt(2 * np.pi / 3), rtol=1e-3)


@pytest.mark.parametrize("k", [-1.0, 401.0, np.nan])
def test_line_refuses_times_it_was_not_checked_for(k):
    with pytest.raises(ValueError, match="k is .*expected"):
        greens_function([k])


# a pool with a Lorentzian line


@pytest.mark.parametrize("alpha", [0.3, np.pi, 5.5])
@pytest.mark.parametrize("ratio", [0.01, 0.6, 1.0, 1.4, 10.0])
def test_lorentzian_pool_against_an_ode_solver(alpha, ratio):
    r = 2 * alpha * ratio
    end = solve_ivp(
        lambda _, m: [-r * m[0] + alpha * m[1], -alpha * m[0]],
        (0, 1),
        [0.0, 1.0],
        method="DOP853",
        rtol=1e-12,
        atol=1e-13,
    ).y[1, -1]
    np.testing.assert_allclose(lorentzian_saturation(alpha, r), end, atol=1e-10)


def test_lorentzian_pool_is_smooth_through_critical_damping():
    alpha = 2.0
    critical = np.exp(-alpha) * (1 + alpha)
    distance = np.array([-1e-3, -1e-7, -1e-12, 0.0, 1e-12, 1e-7, 1e-3])
    found = lorentzian_saturation(alpha, 2 * alpha + distance)
    # dz/dr of a critically damped pool is exp(-alpha) alpha^2 / 6; terms of second order follow
    slope = np.exp(-alpha) * alpha**2 / 6
    np.testing.assert_allclose(found, critical + slope * distance, atol=1e-7)
    np.testing.assert_allclose(found[1:-1], critical + slope * distance[1:-1], rtol=3e-14)


def test_pool_without_decay_turns_and_pool_with_fast_decay_stays():
    alpha = np.linspace(0, 6, 7)
    np.testing.assert_allclose(lorentzian_saturation(alpha, 0.0), np.cos(alpha), atol=1e-15)
    np.testing.assert_allclose(lorentzian_saturation(alpha, 1e9), 1.0, atol=1e-7)
    np.testing.assert_allclose(
        lorentzian_saturation(alpha, 1e4), np.exp(-(alpha**2) / 1e4), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("alpha", "r", "name"), [(1.0, -0.1, "r is -0.1"), (np.nan, 1.0, "alpha is nan")]
)
def test_lorentzian_pool_refuses(alpha, r, name):
    with pytest.raises(ValueError, match=name):
        lorentzian_saturation(alpha, r)


# the pool with the super-Lorentzian line


def _stepped(alpha, tau, steps):
    """The integro-differential equation by trapezoids: plain, and only second-order accurate."""
    step = tau / steps
    rate = (alpha / tau) ** 2
    kernel = greens_function(step * np.arange(steps + 1))
    z = np.empty(steps + 1)
    z[0], slope = 1.0, 0.0
    for n in range(1, steps + 1):
        # slope_n = -rate (known + step z_n / 2), z_n = z_(n-1) + step (slope_(n-1) + slope_n) / 2
        known = step * (kernel[n:0:-1] @ z[:n] - 0.5 * kernel[n] * z[0])
        z[n] = (z[n - 1] + 0.5 * step * (slope - rate * known)) / (1 + 0.25 * rate * step**2)
        slope = -rate * (known + 0.5 * step * z[n])
    return z[-1]


@pytest.mark.parametrize(
    ("alpha", "tau"), [(0.5, 5.0), (1.5, 20.0), (np.pi, 40.0), (6.0, 12.0), (6.0, 120.0)]
)
def test_saturation_against_brute_force(alpha, tau):
    coarse, fine = (_stepped(alpha, tau, steps) for steps in (1500, 3000))
    extrapolated = fine + (fine - coarse) / 3
    assert abs(fine - coarse) < 1e-3  # else the extrapolation would prove nothing
    np.testing.assert_allclose(saturation(alpha, tau), extrapolated, atol=1e-7)


def test_short_pulse_turns_the_pool_like_any_other():
    # far shorter than T2s: nothing has decayed, whatever the line
    alpha = np.linspace(0, 6, 7)
    np.testing.assert_allclose(saturation(alpha, 1e-3), np.cos(alpha), atol=1e-6)


def test_weak_pulse_saturates_by_the_square_of_its_angle():
    # to second order zs = 1 - (alpha / tau)^2 int_0^tau (tau - s) G(s) ds
    tau = np.array([5.0, 30.0, 120.0])
    alpha = 1e-2
    second_order = [
        quad(lambda s, t=t: (t - s) * greens_function([s])[0], 0, t, epsabs=1e-9, limit=200)[0]
        for t in tau
    ]
    loss = (1 - saturation(alpha, tau)) / alpha**2
    np.testing.assert_allclose(loss, np.array(second_order) / tau**2, rtol=alpha**2)


def test_saturation_of_many_pulses_is_that_of_each():
    alpha, tau = np.array([1.0, 2.0, 3.0]), np.array([50.0, 20.0, 50.0])
    each = [float(saturation(a, t)) for a, t in zip(alpha, tau, strict=True)]
    np.testing.assert_allclose(saturation(alpha, tau), each, rtol=1e-14)
    assert saturation(alpha[:, None], tau).shape == (3, 3)


@pytest.mark.parametrize(
    ("alpha", "tau", "name"),
    [(1.0, 0.0, "tau is 0"), (1.0, 401.0, "tau is 401"), (13.0, 5.0, "alpha is 13")],
)
def test_saturation_refuses(alpha, tau, name):
    with pytest.raises(ValueError, match=name):
        saturation(alpha, tau)


# the rate that matches the two, and its table


def test_table_reproduces_the_integral_equation():
    alpha, tau = _pulses(200, ALWAYS_MATCHED, seed=1)
    tau = np.tile(tau[:40], 5)  # pulses of one duration share most of the exact solver's work
    r = _lookup_all(alpha, tau, *table())[:, 0]
    np.testing.assert_allclose(
        lorentzian_saturation(alpha, r), saturation(alpha, tau), atol=1e-6, rtol=0
    )


def test_weak_pulse_has_the_rate_of_the_second_order():
    tau = np.array([5.0, 30.0, 120.0])
    r = _lookup_all(np.zeros(3), tau, *table())[:, 0]
    lorentzian = (r - 1 + np.exp(-r)) / r**2
    second_order = [
        quad(lambda s, t=t: (t - s) * greens_function([s])[0], 0, t, epsabs=1e-9, limit=200)[0]
        for t in tau
    ]
    np.testing.assert_allclose(lorentzian, np.array(second_order) / tau**2, rtol=1e-6)
    np.testing.assert_allclose(matched_damping(0.0, tau), r, rtol=1e-6)


def test_strong_pulse_ends_as_near_as_a_lorentzian_pool_can_come():
    alpha = np.pi * np.array([1.5, 1.7, 1.9, 1.9])
    tau = np.array([25.0, 40.0, 62.5, 30.0])
    r = _lookup_all(alpha, tau, *table())[:, 0]
    gap = lorentzian_saturation(alpha, r) - saturation(alpha, tau)
    dampings = np.linspace(0, 60, 200_001)
    least = [
        np.abs(lorentzian_saturation(a, dampings) - z).min()
        for a, z in zip(alpha, saturation(alpha, tau), strict=True)
    ]
    assert min(least) > 0.03  # no damping reaches zs for these
    assert max(np.abs(gap)) < 0.1
    np.testing.assert_allclose(gap, least, atol=1e-3)


def test_derivatives_are_those_of_the_value():
    alpha, tau = _pulses(300, FLIP_ANGLE_RANGE[1] - 0.01, seed=2)
    tau = np.clip(tau, TAU_RANGE[0] + 0.01, TAU_RANGE[1] - 0.01)
    found = _lookup_all(alpha, tau, *table())
    # Richardson's central differences: error of order step^4, and of step^3 across a knot
    for column, (da, dt) in ((1, (1, 0)), (2, (0, 1))):
        coarse, fine = (
            (
                _lookup_all(alpha + h * da, tau + h * dt, *table())[:, 0]
                - _lookup_all(alpha - h * da, tau - h * dt, *table())[:, 0]
            )
            / (2 * h)
            for h in (2e-5, 1e-5)
        )
        differences = (4 * fine - coarse) / 3
        scale = 1 + np.abs(found[:, column])
        np.testing.assert_allclose(found[:, column] / scale, differences / scale, atol=1e-8)


def test_derivatives_are_those_of_the_matched_rate():
    alpha, tau = _pulses(15, ALWAYS_MATCHED, seed=3)
    alpha, tau = np.clip(alpha, 0.01, None), np.clip(tau, 4.1, 129.9)
    found = _lookup_all(alpha, tau, *table())
    h = 1e-3
    by_alpha = (matched_damping(alpha + h, tau) - matched_damping(alpha - h, tau)) / (2 * h)
    by_tau = (matched_damping(alpha, tau + h) - matched_damping(alpha, tau - h)) / (2 * h)
    np.testing.assert_allclose(found[:, 1], by_alpha, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[:, 2], by_tau, rtol=1e-3, atol=1e-4)


def test_everything_is_finite_and_positive_in_the_range_and_at_its_edges():
    alpha, tau = np.meshgrid(
        np.linspace(*FLIP_ANGLE_RANGE, 301), np.geomspace(*TAU_RANGE, 201), indexing="ij"
    )
    check_range(alpha, tau)
    found = _lookup_all(alpha.ravel(), tau.ravel(), *table())
    assert np.isfinite(found).all()
    assert found[:, 0].min() > 0


def test_range_holds_the_pulses_of_a_train():
    # 0.1 to 0.5 ms, T2s 8 to 20 us, an inversion at B1 = 1.9
    check_range([0.0, 1.9 * np.pi], [0.1e-3 / 20e-6, 0.5e-3 / 8e-6])


@pytest.mark.parametrize(
    ("alpha", "tau", "message"),
    [
        ([1.0, 7.0], 20.0, r"alpha is 7, expected .*\[0, 6\.28319\] rad"),
        (-0.1, 20.0, r"alpha is -0\.1, expected"),
        (1.0, [20.0, 3.0], r"tau is 3, expected .*\[4, 130\]"),
        (1.0, 131.0, r"tau is 131, expected"),
        (np.nan, 20.0, r"alpha is nan, expected"),
        (1.0, np.inf, r"tau is inf, expected"),
    ],
)
def test_pulses_outside_the_table_are_refused(alpha, tau, message):
    with pytest.raises(ValueError, match=message):
        check_range(alpha, tau)
    with pytest.raises(ValueError, match=message):
        matched_damping(alpha, tau)


def test_table_is_kept_and_cannot_be_changed():
    assert table() is table()
    with pytest.raises(ValueError, match="read-only"):
        table()[0][0, 0] = 0.0
