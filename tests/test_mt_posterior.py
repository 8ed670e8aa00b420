"""The Bayes floor: against a posterior that can be had by counting, and as a lower bound."""

import numpy as np
import pytest

from qmri.crb import bound_from_jacobian, with_amplitude
from qmri.mt import MTModel, PulseTrain
from qmri.mt.basis import svd_basis
from qmri.mt.posterior import bayes_floor

SIGMA, MAGNITUDE = 0.01, (0.1, 1.0)


@pytest.fixture(scope="module")
def model():
    train = PulseTrain.default(60)
    signals = MTModel(train).signal(MTModel(train).sample(500, np.random.default_rng(0)))
    return MTModel(train, svd_basis(signals, 8)[0])


def measured(model, n, sigma=SIGMA, magnitude=MAGNITUDE, seed=1):
    rng = np.random.default_rng(seed)
    theta = model.sample(n, rng)
    m0 = rng.uniform(*magnitude, n) * np.exp(2j * np.pi * rng.random(n))
    clean = m0[:, np.newaxis] * model.signal(theta)
    noise = rng.standard_normal((n, model.measurements, 2)).view(complex)[..., 0]
    return clean + sigma * noise, theta, m0


def test_with_nothing_but_noise_the_posterior_is_the_prior(model):
    """Then the weighted posterior mean is one number, and the floor its weighted variance."""
    sigma = 30.0
    y, theta, m0 = measured(model, 30, sigma)
    found = bayes_floor(
        model, y, theta, m0, sigma=sigma, magnitude=MAGNITUDE, steps=2000, thin=20,
        rng=np.random.default_rng(2),
    )  # fmt: skip
    rng = np.random.default_rng(3)
    prior, rho = model.sample(20_000, rng), rng.uniform(*MAGNITUDE, 20_000)
    crb = bound_from_jacobian(with_amplitude(*model.signal_and_jacobian(prior)), sigma)[:, :3]
    weight = rho[:, np.newaxis] ** 2 / crb
    mean = (weight * prior[:, :3]).sum(axis=0) / weight.sum(axis=0)
    expected = np.mean(weight * (prior[:, :3] - mean) ** 2, axis=0)
    # The weights of T1 and T2f have tails too heavy for chains of this length.
    assert np.mean(found.floor[:, 0]) == pytest.approx(expected[0], rel=0.4)


def test_the_prior_is_worth_less_where_signals_are_clearer():
    """At a hundredth of the noise the loss is near 1, that of an unbiased estimator."""
    train = PulseTrain.default(571)
    signals = MTModel(train).signal(MTModel(train).sample(300, np.random.default_rng(0)))
    model = MTModel(train, svd_basis(signals, 13)[0])
    y, theta, m0 = measured(model, 8, 1e-4, (0.9, 1.0))
    found = bayes_floor(
        model, y, theta, m0, sigma=1e-4, magnitude=(0.9, 1.0), steps=500,
        rng=np.random.default_rng(4),
    )  # fmt: skip
    assert 0.5 < np.median(found.floor[:, 1]) < 1.4
    y, theta, m0 = measured(model, 8)
    noisy = bayes_floor(
        model, y, theta, m0, sigma=SIGMA, magnitude=MAGNITUDE, steps=300,
        rng=np.random.default_rng(4),
    )  # fmt: skip
    assert np.median(noisy.floor[:, 1]) < 0.5


def test_no_estimator_can_beat_it_and_it_cannot_beat_itself(model):
    """Its own loss at the truth agrees with the floor, and knowing nothing costs more."""
    y, theta, m0 = measured(model, 64)
    found = bayes_floor(
        model, y, theta, m0, sigma=SIGMA, magnitude=MAGNITUDE, steps=600,
        rng=np.random.default_rng(5),
    )  # fmt: skip
    floor, loss = found.floor.mean(), found.loss.mean()
    spread = found.loss.mean(axis=1).std() / 8
    assert abs(loss - floor) < 4 * spread
    assert 0 < floor < 1, "with noise of one per cent the prior is worth a lot"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 20}, "steps must be at least 100, got 20"),
        ({"sigma": 1e-9}, "sigma of 1e-09 is too small"),
        ({"m0": np.ones(3)}, "coefficients and m0 must have shapes"),
    ],
)
def test_bad_input(model, changes, message):
    y, theta, m0 = measured(model, 4)
    arguments = {
        "coefficients": y, "theta": theta, "m0": m0, "sigma": SIGMA, "magnitude": MAGNITUDE,
        "steps": 100, "rng": np.random.default_rng(0), **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        bayes_floor(model, **arguments)
