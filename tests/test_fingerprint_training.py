"""Training on fingerprints: it learns what theory says, and an interruption leaves no trace."""

from __future__ import annotations

import sys
import time

import numpy as np
import psutil
import pytest
import torch

from qmri import training
from qmri.artefacts import load_arrays
from qmri.datasets import Fingerprints
from qmri.losses import FINGERPRINT_LOSSES, FingerprintLoss, fingerprint_loss
from qmri.networks import FingerprintEstimator, FingerprintNetwork
from qmri.training import FingerprintTask, train_fingerprints, train_fingerprints_in_parallel


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More of them only wait for each other at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NAMES = ("m0s", "T1", "T2f")
RANK = 4


def fingerprints(n: int, seed: int = 0) -> Fingerprints:
    """Smooth functions of four parameters; bounds of some size, as nobody compares with them."""
    rng = np.random.default_rng(seed)
    theta = np.column_stack(
        [
            rng.uniform(0.05, 0.3, n),
            rng.uniform(0.5, 3, n),
            rng.uniform(0.02, 0.2, n),
            rng.normal(size=n),
        ]
    )
    m0s, t1, t2f, b0 = theta.T
    curves = (1 + 0j * b0, 3 * m0s * np.exp(0.3j * b0), np.exp(-t1), t2f * (5 - 1j * b0))
    crb = rng.uniform(0.5, 2, (n, 3)) * np.array([0.02, 0.2, 0.02]) ** 2
    return Fingerprints(np.column_stack(curves), theta, crb)


def network(**changes) -> FingerprintNetwork:
    options = {"widths": (2 * RANK, 32, 32, 32, 3), "skips": [(1, 3)], "groups": 2, **changes}
    return FingerprintNetwork(**options)


@pytest.fixture(scope="module")
def data() -> tuple[Fingerprints, Fingerprints]:
    return fingerprints(1300).split(1000, 300)


CRB = fingerprint_loss("crb")


class TestNoise:
    def test_m0_and_noise_have_the_distribution_asked_for(self):
        clean = fingerprints(20_000)
        noisy = clean.noisy(np.random.default_rng(1), sigma=0.02, magnitude=(0.1, 1.0))
        size, phase = np.abs(noisy.m0), np.angle(noisy.m0)
        # A uniform variable has a variance of 1 / 12 of its range, squared: standard errors.
        assert size.min() > 0.1 and size.max() < 1
        assert size.mean() == pytest.approx(0.55, abs=4 * 0.9 / np.sqrt(12 * 20_000))
        assert phase.mean() == pytest.approx(0, abs=4 * 2 * np.pi / np.sqrt(12 * 20_000))
        rest = noisy.coefficients - noisy.m0[:, np.newaxis] * clean.coefficients
        for part in (rest.real, rest.imag):
            np.testing.assert_allclose(part.std(axis=0), 0.02, rtol=4 / np.sqrt(2 * 20_000))
            assert np.all(np.abs(part.mean(axis=0)) < 4 * 0.02 / np.sqrt(20_000))
        assert abs(np.mean(rest.real * rest.imag)) < 4 * 0.02**2 / np.sqrt(3 * 20_000)

    def test_bounds_belong_to_m0_and_noise(self, data):
        """Twice the noise is four times the variance, half the signal another four times."""
        noisy = data[0].noisy(np.random.default_rng(1), sigma=0.02, magnitude=(0.5, 0.5))
        np.testing.assert_allclose(noisy.crb, 16 * data[0].crb)
        assert noisy.sigma == 0.02

    def test_the_mirrored_half_has_the_opposite_off_resonance(self):
        """Here conjugation is what B0 -> -B0 does, so that the matrix is the identity."""
        clean = fingerprints(2000)
        noisy = clean.noisy(
            np.random.default_rng(1), sigma=1e-9, magnitude=(1, 1), conjugation=np.eye(RANK)
        )
        found = noisy.coefficients / noisy.m0[:, np.newaxis]
        mirrored = np.abs(found - clean.coefficients).max(axis=1) > 1e-5
        np.testing.assert_allclose(found[mirrored], clean.coefficients[mirrored].conj(), atol=1e-5)
        assert mirrored.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(2000))
        np.testing.assert_array_equal(noisy.theta, clean.theta)

    def test_the_same_generator_gives_the_same(self, data):
        one, same, other = (data[0].noisy(np.random.default_rng(s)) for s in (1, 1, 2))
        np.testing.assert_array_equal(one.coefficients, same.coefficients)
        assert np.all(one.coefficients != other.coefficients)

    def test_parts_keep_their_order(self):
        whole = fingerprints(10)
        first, second = whole.split(6, 3)
        np.testing.assert_array_equal(first.theta, whole.theta[:6])
        np.testing.assert_array_equal(second.coefficients, whole.coefficients[6:9])
        np.testing.assert_array_equal(whole[[2, 0]].crb, whole.crb[[2, 0]])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"coefficients": np.ones((10, 3))}, "coefficients must be complex .*got float64"),
            ({"theta": np.ones((9, 4))}, r"theta must have shape \(10, parameters\), got \(9, 4\)"),
            ({"theta": np.full((10, 4), np.nan)}, "theta must be finite, got 10 rows"),
            ({"crb": np.ones((10, 5))}, r"crb must have shape \(10, targets\).* got \(10, 5\)"),
            ({"crb": np.zeros((10, 3))}, "crb must be positive, got 10 rows"),
            ({"crb": np.full((10, 3), np.nan)}, "crb must be positive, got 10 rows with NaN"),
            ({"m0": np.ones(9)}, r"m0 must have shape \(10,\), got \(9,\)"),
            ({"sigma": 0}, "sigma must be positive, got 0"),
        ],
    )
    def test_what_are_no_fingerprints(self, change, message):
        whole = fingerprints(10)
        parts = {"coefficients": whole.coefficients, "theta": whole.theta, "crb": whole.crb}
        with pytest.raises(ValueError, match=message):
            Fingerprints(**{**parts, **change})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sigma": -1}, "sigma must be positive, got -1"),
            ({"magnitude": (0, 1)}, r"magnitude must be \(low, high\).*got \(0, 1\)"),
            ({"magnitude": (1, 0.5)}, "magnitude must be"),
            ({"conjugation": np.eye(2)}, r"conjugation must have shape \(4, 4\), got \(2, 2\)"),
        ],
    )
    def test_noise_that_is_none(self, data, options, message):
        with pytest.raises(ValueError, match=message):
            data[0].noisy(np.random.default_rng(0), **options)

    @pytest.mark.parametrize("counts", [(0, 3), (8, 8), ()])
    def test_parts_that_are_not_there(self, counts):
        with pytest.raises(ValueError, match="counts must be positive and add up to at most 10"):
            fingerprints(10).split(*counts)


def loss_of(loss: FingerprintLoss, estimate, truth, crb) -> float:
    weights = loss.weights(truth, crb, NAMES)
    return float(np.mean(weights * np.abs(estimate - truth) ** loss.power))


class TestLosses:
    def test_an_efficient_estimator_has_a_crb_loss_of_one(self):
        rng = np.random.default_rng(1)
        truth, crb = rng.uniform(1, 2, (100_000, 3)), rng.uniform(1e-4, 1, (100_000, 3))
        estimate = truth + np.sqrt(crb) * rng.standard_normal(truth.shape)
        expected = 4 * np.sqrt(2 / truth.size)  # the variance of a squared normal variable is 2
        assert loss_of(CRB, estimate, truth, crb) == pytest.approx(1, abs=expected)
        for name in ("crb-m0s", "crb-t1", "crb-t2f"):
            found = loss_of(fingerprint_loss(name), estimate, truth, crb)
            assert found == pytest.approx(1, abs=expected * np.sqrt(3))

    def test_by_hand(self):
        truth, crb = np.array([[0.1, 1, 0.1], [0.2, 2, 0.1]]), np.full((2, 3), 0.01)
        estimate = truth + np.array([[0.1, 0, 0], [0, -1, 0.05]])
        assert loss_of(CRB, estimate, truth, crb) == pytest.approx((1 + 100 + 0.25) / 6)
        mse = fingerprint_loss("mse")
        assert loss_of(mse, estimate, truth, crb) == pytest.approx((0.01 + 1 + 0.0025) / 6)
        relative = fingerprint_loss("relative")
        assert loss_of(relative, estimate, truth, crb) == pytest.approx((1 + 0.5 + 0.5) / 6)
        only = fingerprint_loss("crb-t2f")
        assert loss_of(only, estimate, truth, crb) == pytest.approx(0.25 / 2)

    def test_infinite_bounds_are_left_out_of_the_mean(self):
        truth, crb = np.ones((4, 3)), np.ones((4, 3))
        crb[0, 1] = np.inf
        estimate = truth + np.sqrt([[1, 7, 2]] * 4)
        assert loss_of(CRB, estimate, truth, crb) == pytest.approx((1 + 7 + 2) / 3)

    def test_a_cap_keeps_them(self):
        whole = fingerprints(10)
        whole.crb[0] = np.inf
        capped = whole.capped([1.0, np.inf, 1e-3])
        assert capped.crb[0].tolist() == [1.0, np.inf, 1e-3]
        np.testing.assert_array_equal(capped.crb[1:, :2], whole.crb[1:, :2])

    def test_names(self):
        assert set(FINGERPRINT_LOSSES) == {"crb", "mse", "relative", "crb-m0s", "crb-t1", "crb-t2f"}
        with pytest.raises(ValueError, match="name must be one of crb, mse.*got 'nmse'"):
            fingerprint_loss("nmse")

    def test_losses_that_are_none(self):
        with pytest.raises(ValueError, match="measure must be 'crb', 'squared' or 'relative'"):
            FingerprintLoss("absolute")
        ones = np.ones((2, 3))
        with pytest.raises(ValueError, match="only must be one of .*got 'Rx'"):
            FingerprintLoss("crb", only="Rx").weights(ones, ones, NAMES)
        with pytest.raises(ValueError, match="truth must not be zero .*got 3 zeros"):
            FingerprintLoss("relative").weights(0 * ones[:1], ones[:1], NAMES)
        with pytest.raises(ValueError, match="crb must be finite for some samples of each"):
            CRB.weights(ones, np.inf * ones, NAMES)


@pytest.fixture(scope="module")
def linear():
    """What is measured is three parameters themselves, and their norm: all but noise is linear.

    Their prior is normal, and so is the noise: the posterior mean is known.
    """
    rng = np.random.default_rng(5)
    sigma, prior = 0.1, np.array([0.1, 0.05, 0.2])
    theta = prior * rng.standard_normal((20_000, 3))
    coefficients = np.column_stack([np.full(20_000, 10), *theta.T]).astype(complex)
    crb = np.full((20_000, 3), sigma**2)
    whole = Fingerprints(coefficients, theta, crb, sigma=sigma)
    begin = FingerprintNetwork((8, 64, 64, 3), groups=1, rotate=True, seed=1)
    options = {"epochs": 8, "learning_rate": 0.01, "schedule": "cosine", "batch": 200}
    shrinkage = prior**2 / (prior**2 + sigma**2)
    trained, history = train_fingerprints(
        begin, *whole.split(16_000, 4000), CRB, sigma=sigma, magnitude=(1, 1), **options
    )
    return whole, trained, history, shrinkage


class TestTheory:
    def test_a_network_falls_below_one_by_knowing_its_prior(self, linear):
        """The posterior variance in units of the bound is the factor of shrinkage."""
        _, _, history, shrinkage = linear
        found = history.validation["crb"][-1]
        # 4000 squared errors give each mean to 2.2 %; the rest is the network's.
        np.testing.assert_allclose(found, shrinkage, rtol=0.1)

    def test_it_is_the_posterior_mean(self, linear):
        whole, trained, _, shrinkage = linear
        noisy = whole.noisy(np.random.default_rng(3), sigma=0.1, magnitude=(1, 1))
        found = FingerprintEstimator(trained, "none").estimate(noisy.coefficients)
        turned = noisy.coefficients / noisy.m0[:, np.newaxis]
        expected = shrinkage * turned.real[:, 1:]
        spread = np.sqrt(shrinkage) * 0.1  # of the posterior
        assert np.all(np.mean((found - expected) ** 2, axis=0) < 0.05 * spread**2)


class TestTraining:
    def test_history_holds_every_loss(self, data):
        """By hand; steps are too small to move anything."""
        begin = network()
        _, history = train_fingerprints(begin, *data, CRB, epochs=1, learning_rate=1e-12, seed=4)
        rng = np.random.default_rng(np.random.SeedSequence(4, spawn_key=(0,)))
        noisy = data[1].noisy(rng)
        x = FingerprintEstimator(begin, "none").estimate(noisy.coefficients)
        error = np.abs(x - noisy.targets)
        expected = {
            "crb": error**2 / noisy.crb, "squared": error**2, "relative": error / noisy.targets,
        }  # fmt: skip
        for name, values in expected.items():
            np.testing.assert_allclose(history.validation[name][0], values.mean(axis=0), rtol=1e-4)

    @pytest.mark.parametrize("name", FINGERPRINT_LOSSES)
    def test_each_loss_falls(self, data, name):
        """Below that of who always says the mean, which needs no measurement."""
        loss = fingerprint_loss(name)
        options = {"epochs": 10, "batch": 50, "learning_rate": 0.01, "schedule": "cosine"}
        _, history = train_fingerprints(network(), *data, loss, **options)
        own, counts = history.validation[loss.measure], [True] * 3
        if loss.only is not None:
            counts = np.array(NAMES) == loss.only
        own = own[:, counts].mean(axis=1)
        # A bound of M0 = 1 is divided by |M0|^2, whose mean is 0.37 between 0.1 and 1.
        factor = 0.37 if loss.measure == "crb" else 1
        held_out = data[1]
        mean = loss_of(loss, held_out.targets.mean(axis=0), held_out.targets, held_out.crb)
        assert own[-1] < 0.9 * factor * mean
        assert history.best_epoch == np.argmin(own)

    def test_where_training_begins_is_left_as_it_is(self, data):
        begin = network()
        before = begin.arrays()
        train_fingerprints(begin, *data, CRB, epochs=1)
        for name, values in begin.arrays().items():
            np.testing.assert_array_equal(values, before[name])

    def test_validation_data_teach_nothing(self, data):
        other = fingerprints(300, seed=8)
        one, _ = train_fingerprints(network(), data[0], data[1], CRB, epochs=1)
        same, _ = train_fingerprints(network(), data[0], other, CRB, epochs=1)
        for name, values in one.arrays().items():
            np.testing.assert_array_equal(same.arrays()[name], values)

    def test_noise_is_new_in_every_epoch(self, data, monkeypatch):
        shown = []
        as_usual = FingerprintNetwork.inputs

        def spying(network, coefficients):
            shown.append(coefficients)
            return as_usual(network, coefficients)

        monkeypatch.setattr(FingerprintNetwork, "inputs", spying)
        train_fingerprints(network(), *data, CRB, epochs=3)
        validation, *epochs = shown
        assert len(validation) == 300 and [len(e) for e in epochs] == [1000] * 3
        assert np.all(epochs[0] != epochs[1]) and np.all(epochs[1] != epochs[2])

    def test_the_rate_is_halved_ten_times_less_one(self, data):
        """After 400 epochs it has been halved every 40."""
        _, history = train_fingerprints(network(), *data, CRB, epochs=20, learning_rate=0.01)
        np.testing.assert_allclose(history.learning_rate, 0.01 * 0.5 ** (np.arange(20) // 2))

    def test_the_cosine_ends_at_zero(self, data):
        options = {"epochs": 20, "learning_rate": 0.01, "schedule": "cosine", "batch": 50}
        _, history = train_fingerprints(network(), *data, CRB, **options)
        rate = history.learning_rate
        assert np.all(np.diff(rate) < 0) and rate[0] < 0.01 and rate[-1] < 1e-5
        assert rate[9] == pytest.approx(0.005, rel=0.02)

    def test_a_loss_that_is_lost(self, data):
        with pytest.raises(FloatingPointError, match="no longer finite in epoch 0; .* than 1e"):
            train_fingerprints(network(), *data, CRB, epochs=2, learning_rate=1e30, batch=50)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs must be 1 or more, got 0"),
            ({"batch": 0}, "batch must be 1 or more, got 0"),
            ({"batch": 2000}, "batch must be at most 1000, the training set, got 2000"),
            ({"learning_rate": np.nan}, "learning_rate must be positive, got nan"),
            ({"schedule": "linear"}, "schedule must be one of step, cosine, got 'linear'"),
            ({"single_precision": 2}, "single_precision must be a share from 0 to 1, got 2"),
        ],
    )
    def test_options_that_are_none(self, data, options, message):
        with pytest.raises(ValueError, match=message):
            train_fingerprints(network(), *data, CRB, **options)

    def test_a_network_for_something_else(self, data):
        other = network(widths=(10, 32, 32, 32, 3))
        with pytest.raises(ValueError, match="training must be to estimate 3 .* from 5 coeff.* 4"):
            train_fingerprints(other, *data, CRB)


OPTIONS = {"epochs": 4, "batch": 100, "single_precision": 0.5, "conjugation": np.eye(RANK)}


@pytest.fixture(scope="module")
def uninterrupted(data):
    return train_fingerprints(network(), *data, CRB, **OPTIONS)


class TestInterruption:
    @pytest.mark.parametrize("epoch", [1, 2, 3])
    @pytest.mark.parametrize("moment", ["backward", "_validate"])
    def test_it_leaves_no_trace(self, data, uninterrupted, tmp_path, monkeypatch, epoch, moment):
        """Stopped between two steps, or after the last of an epoch."""
        monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", -1.0)
        checkpoint, run = tmp_path / "run.npz", training._FingerprintRun
        owner = torch.Tensor if moment == "backward" else run
        as_usual, calls = getattr(owner, moment), []

        def interrupted(*arguments):
            calls.append(moment)
            if len(calls) == epoch * (10 if moment == "backward" else 1) + 1:
                raise KeyboardInterrupt
            return as_usual(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(owner, moment, interrupted)
            with pytest.raises(KeyboardInterrupt):
                train_fingerprints(network(), *data, CRB, checkpoint=checkpoint, **OPTIONS)
        assert len(load_arrays(checkpoint)["training"]) == epoch
        found = train_fingerprints(network(), *data, CRB, checkpoint=checkpoint, **OPTIONS)
        for name, values in uninterrupted[0].arrays().items():
            np.testing.assert_array_equal(found[0].arrays()[name], values)
        np.testing.assert_array_equal(found[1].training, uninterrupted[1].training)
        np.testing.assert_array_equal(found[1].learning_rate, uninterrupted[1].learning_rate)
        for name, values in uninterrupted[1].validation.items():
            np.testing.assert_array_equal(found[1].validation[name], values)

    @pytest.mark.parametrize(
        "change",
        [
            {"seed": 1},
            {"epochs": 5},
            {"sigma": 0.02},
            {"conjugation": None},
            {"loss": "mse"},
            {"begin": 7},
        ],
    )
    def test_a_checkpoint_of_another_run(self, data, tmp_path, monkeypatch, change):
        monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", -1.0)
        checkpoint = tmp_path / "run.npz"
        train_fingerprints(network(), *data, CRB, checkpoint=checkpoint, **OPTIONS)
        options = {**OPTIONS, **change}
        loss = fingerprint_loss(options.pop("loss", "crb"))
        begin = network(seed=options.pop("begin", 0))
        with pytest.raises(ValueError, match="checkpoint is of another run"):
            train_fingerprints(begin, *data, loss, checkpoint=checkpoint, **options)

    def test_progress_bar_goes_to_standard_error(self, data, capsys):
        train_fingerprints(network(), *data, CRB, epochs=1)
        assert capsys.readouterr() == ("", "")
        train_fingerprints(network(), *data, CRB, epochs=1, progress=True)
        shown = capsys.readouterr()
        assert shown.out == "" and "1/1" in shown.err


FOREVER = """
import numpy as np
from qmri.datasets import Fingerprints
from qmri.losses import fingerprint_loss
from qmri.networks import FingerprintNetwork
from qmri.training import FingerprintTask, train_fingerprints_in_parallel

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    data = Fingerprints(
        rng.normal(size=(64, 3, 2)).view(complex)[..., 0],
        rng.random((64, 7)) + 0.1,
        np.ones((64, 3)),
    )
    options = {"epochs": 1_000_000, "batch": 8, "seed": 0}
    task = FingerprintTask(FingerprintNetwork((6, 8, 3)), fingerprint_loss("crb"), options)
    train_fingerprints_in_parallel({"a": task, "b": task}, data, data, workers=2)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Left alone they would train on, beside those of the run that takes over."""
    script = tmp_path / "forever.py"
    script.write_text(FOREVER)
    run = psutil.Popen([sys.executable, str(script)])
    workers, deadline = [], time.monotonic() + 120
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        workers = [
            child
            for child in run.children(recursive=True)
            if any("spawn_main" in part for part in child.cmdline())
            and child.cpu_times().user > 1  # it has begun
        ]
    assert len(workers) >= 2
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


class TestInParallel:
    def tasks(self):
        networks = [FingerprintNetwork((2 * RANK, 16, 3), seed=k) for k in range(3)]
        return {
            f"network {k}": FingerprintTask(
                network, fingerprint_loss(("crb", "mse", "relative")[k]),
                {"epochs": 2, "batch": 64, "seed": k},
            )
            for k, network in enumerate(networks)
        }  # fmt: skip

    @pytest.mark.parametrize("workers", [1, 2])
    def test_each_is_as_if_it_were_alone(self, workers, tmp_path):
        training_set, validation = fingerprints(256), fingerprints(64, seed=1)
        found = train_fingerprints_in_parallel(
            self.tasks(), training_set, validation, workers=workers, checkpoint=tmp_path / "run.npz"
        )
        assert list(found) == list(self.tasks())
        for name, task in self.tasks().items():
            alone, history = train_fingerprints(
                task.network, training_set, validation, task.loss, **task.options
            )
            network, together = found[name]
            for key, value in alone.arrays().items():
                np.testing.assert_array_equal(network.arrays()[key], value)
            np.testing.assert_array_equal(together.training, history.training)
        assert not list(tmp_path.iterdir())

    def test_a_loss_that_explodes_names_its_network(self):
        tasks = self.tasks()
        wild = FingerprintTask(
            tasks["network 0"].network, fingerprint_loss("crb"),
            {"epochs": 3, "batch": 64, "seed": 0, "learning_rate": 1e30},
        )  # fmt: skip
        with pytest.raises(FloatingPointError, match="no longer finite"):
            train_fingerprints_in_parallel(
                {"wild": wild}, fingerprints(256), fingerprints(64, seed=1), workers=1
            )
