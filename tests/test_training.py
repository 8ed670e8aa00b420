"""The training loop: it learns what theory says, and an interruption leaves no trace."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from qmri import IVIM, FunctionModel, Gaussian, Parameter, Rician, training
from qmri.artefacts import load_arrays
from qmri.datasets import Dataset, Labels, mle_labels, simulate, truth_labels
from qmri.losses import Recipe, recipe
from qmri.networks import Networks, mlp_widths
from qmri.training import Task, train, train_in_parallel

MODEL = IVIM((0, 10, 20, 30, 50, 80, 100, 200, 400, 800))
RECIPES = ("supervised-gt", "self-supervised", "supervised-mle-rician", "supervised-gt-mae")


def labelled() -> Dataset:
    theta = MODEL.sample(1000, np.random.default_rng(1))
    bare = simulate(MODEL, Rician(1 / 30), theta, np.random.default_rng(2))
    return bare.with_labels({"mle-rician": mle_labels(bare, Rician(1 / 30))})


@pytest.fixture(scope="module")
def data() -> Dataset:
    return labelled()


def networks(data: Dataset, count: int) -> Networks:
    return Networks(mlp_widths(data.model), data.mean, seeds=range(count))


def tasks(data: Dataset, names=RECIPES) -> list[Task]:
    return [Task(data, recipe(name), seed) for seed, name in enumerate(names)]


def estimates(trained: Networks, signals: np.ndarray) -> np.ndarray:
    """The same signals through all networks of a stack."""
    with torch.inference_mode():
        x = torch.tensor(signals, dtype=torch.float32).expand(len(trained), -1, -1)
        return trained(x).numpy().astype(np.float64)


def assert_same_weights(one: Networks, other: Networks, atol: float = 0.0) -> None:
    for name, values in one.arrays().items():
        np.testing.assert_allclose(other.arrays()[name], values, rtol=0, atol=atol, err_msg=name)


def assert_same_history(one, other) -> None:
    for name in ("training", "validation", "best_epoch", "diverged"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


# Normal noise on a normal quantity that is measured twice.
MEAN, PRIOR, NOISE = 3.0, 0.5, 0.5
# Variance of the average of two measurements, and of the posterior.
AVERAGE = NOISE**2 / 2
SHRINKAGE = PRIOR**2 / (PRIOR**2 + AVERAGE)
POSTERIOR = PRIOR**2 * AVERAGE / (PRIOR**2 + AVERAGE)


@pytest.fixture(scope="module")
def learnt():
    level = FunctionModel(
        lambda t, level: level, [0.0, 1.0], [Parameter("level", "a", "1", (1, 5), (-9, 9))]
    )
    rng = np.random.default_rng(3)
    theta = rng.normal(MEAN, PRIOR, (20_000, 1))
    data = simulate(level, Gaussian(NOISE), theta, rng)
    begin = Networks(mlp_widths(level, hidden=2, width=10), data.mean, seeds=[1, 2])
    both = [Task(data, recipe(name)) for name in ("supervised-gt", "self-supervised")]
    trained, history = train(begin, both, epochs=25)
    found = estimates(trained, data.signals)[..., 0]
    return data.signals.mean(axis=1), dict(zip(("truth", "none"), found, strict=True)), history


class TestTheory:
    """Where all is known in closed form."""

    def test_who_learns_the_truth_learns_the_posterior_mean(self, learnt):
        measured, found, _ = learnt
        slope, _ = np.polyfit(measured, found["truth"], 1)
        # The fit to 16,000 voxels leaves 0.004; the rest is the network's.
        assert slope == pytest.approx(SHRINKAGE, abs=0.02)
        expected = MEAN + SHRINKAGE * (measured - MEAN)
        # What the network misses of the posterior mean adds less than 1 % to its error.
        assert np.mean((found["truth"] - expected) ** 2) < 0.01 * POSTERIOR

    def test_its_loss_is_the_posterior_variance(self, learnt):
        # In units of the squared mean; 4000 voxels for validation give it to 2.2 %.
        assert learnt[2].best[0] * MEAN**2 == pytest.approx(POSTERIOR, rel=0.08)

    def test_who_learns_without_labels_learns_least_squares(self, learnt):
        measured, found, _ = learnt
        slope, _ = np.polyfit(measured, found["none"], 1)
        assert slope == pytest.approx(1, abs=0.02)
        assert np.mean((found["none"] - measured) ** 2) < 0.01 * AVERAGE

    def test_its_loss_is_what_least_squares_leaves(self, learnt):
        # Two measurements about their average: a variance of half that of the noise.
        assert learnt[2].best[1] == pytest.approx(NOISE**2 / 2, rel=0.08)

    def test_an_easy_problem_is_learnt(self):
        """Two parameters at SNR 1000: the noise is nothing, the function all there is to learn."""
        decay = FunctionModel(
            lambda t, S0, R2: S0 * math.exp(-t * R2),
            [0.0, 0.5, 1.0, 2.0],
            [
                Parameter("S0", "S_0", "1", (0.8, 1.2), (0, 10)),
                Parameter("R2", "R_2", "1/s", (0.5, 2), (0, 10)),
            ],
            amplitude="S0",
        )
        rng = np.random.default_rng(4)
        theta = decay.sample(5000, rng)
        data = simulate(decay, Rician(1e-3), theta, rng)
        begin = Networks(mlp_widths(decay, width=10), data.mean, seeds=[0, 1])
        trained, _ = train(begin, tasks(data, RECIPES[:2]), epochs=40, batch=50, learning_rate=2e-3)
        test = decay.sample(1000, rng)
        error = estimates(trained, decay.signal(test)) - test
        spread = np.ptp(decay.training, axis=1) / np.sqrt(12)  # error of who always says the mean
        assert np.all(np.sqrt(np.mean(error**2, axis=1)) < 0.1 * spread)


class TestLoss:
    @pytest.mark.parametrize("name", [*RECIPES, "hybrid-0.5", "supervised-mle-rician-dfast"])
    def test_history_holds_the_recipes_loss(self, data, name):
        """On validation data, by hand; steps are too small to move anything."""
        begin = networks(data, 1)
        _, history = train(begin, tasks(data, [name]), epochs=1, learning_rate=1e-12)
        x = estimates(begin, data.signals)[0]
        mle, w = data.labels["mle-rician"], 1 / data.mean
        label = {
            "supervised-gt": data.theta,
            "supervised-gt-mae": data.theta,
            "hybrid-0.5": (data.theta + mle.values) / 2,
        }.get(name, mle.values)
        usable = np.full(1000, True) if "gt" in name else mle.usable
        if name.endswith("dfast"):
            w = w * [1e-6, 1e-6, 1e-6, 1]
        loss = np.sum((w * (x - label)) ** 2, axis=1)
        if name.endswith("mae"):
            loss = np.sum(np.abs(w * (x - label)), axis=1)
        if name == "self-supervised":
            loss, usable = np.mean((MODEL.signal(x) - data.signals) ** 2, axis=1), True
        expected = np.mean(loss[usable & ~data.training])
        assert history.validation[0, 0] == pytest.approx(expected, rel=1e-5)

    def test_labels_on_bounds_teach_nothing(self, data):
        """The same networks whatever stands in a label that is not usable."""
        label = data.labels["mle-rician"]
        assert not label.usable.all()
        values = np.where(label.usable[:, np.newaxis], label.values, 1e6)
        other = data.with_labels({"mle-rician": Labels(values, label.usable, label.bound_hit)})
        found = [
            train(networks(d, 1), tasks(d, ["supervised-mle-rician"]), epochs=2)[0]
            for d in (data, other)
        ]
        assert_same_weights(*found)

    def test_validation_data_teach_nothing(self, data):
        theta = np.where(data.training[:, np.newaxis], data.theta, data.theta[::-1])
        signals = np.where(data.training[:, np.newaxis], data.signals, data.signals[::-1])
        other = Dataset(MODEL, data.noise, theta, signals, data.training)
        found = [
            train(networks(data, 1), tasks(d, ["supervised-gt"]), epochs=1)[0]
            for d in (data, other)
        ]
        assert_same_weights(*found)


class TestSideBySide:
    def test_a_stack_is_its_networks_one_by_one(self, data):
        begin, all_tasks = networks(data, 4), tasks(data)
        together, history = train(begin, all_tasks, epochs=5)
        for k, task in enumerate(all_tasks):
            alone, own = train(begin.at([k]), [task], epochs=5)
            # Forty steps of 0.001 with gradients rounded to seven digits.
            assert_same_weights(together.at([k]), alone, atol=1e-5)
            np.testing.assert_allclose(history.validation[:, k], own.validation[:, 0], rtol=1e-4)
            np.testing.assert_allclose(history.training[:, k], own.training[:, 0], rtol=1e-4)

    def test_where_training_begins_is_left_as_it_is(self, data):
        begin = networks(data, 1)
        before = begin.at([0])
        train(begin, tasks(data, ["supervised-gt"]), epochs=2)
        assert_same_weights(begin, before)

    def test_seed_is_the_order_of_the_data(self, data):
        begin = networks(data, 1).at([0, 0, 0])
        same = [Task(data, recipe("supervised-gt"), seed) for seed in (5, 5, 6)]
        trained, _ = train(begin, same, epochs=2)
        one, twin, other = (trained.at([k]).arrays() for k in range(3))
        for name, values in one.items():
            np.testing.assert_allclose(twin[name], values, rtol=0, atol=1e-6)
        assert any(np.abs(other[name] - one[name]).max() > 1e-4 for name in one)

    def test_every_epoch_meets_all_training_data_in_a_new_order(self, data):
        material = training._Material(tasks(data, ["supervised-gt"]))
        orders = [material.order(0, epoch, {}).numpy() for epoch in range(3)]
        for order in orders:
            np.testing.assert_array_equal(np.sort(order), np.flatnonzero(data.training))
        for one, other in itertools.combinations(orders, 2):
            # Two permutations agree at one place, on average, whatever their length.
            assert np.sum(one == other) < 10

    @pytest.mark.slow
    def test_sixteen_cost_less_than_four(self):
        """Processor time, as other programs may be at work."""
        theta = MODEL.sample(10_000, np.random.default_rng(5))
        data = simulate(MODEL, Rician(1 / 30), theta, np.random.default_rng(6))
        seconds = {1: [], 16: []}
        for count, times in [*seconds.items()] * 3:
            begin, same = networks(data, count), tasks(data, ["supervised-gt"] * count)
            start = time.process_time()
            train(begin, same, epochs=3)
            times.append(time.process_time() - start)
        assert min(seconds[16]) < 4 * min(seconds[1])


@pytest.fixture(scope="module")
def stopped(data):
    """Steps so long that validation losses go up and down."""
    begin, all_tasks = networks(data, 4), tasks(data)
    options = {"learning_rate": 0.05, "batch": 50}
    return begin, all_tasks, options, train(begin, all_tasks, epochs=60, patience=3, **options)


class TestStopping:
    def test_each_stops_when_its_own_patience_runs_out(self, stopped):
        history = stopped[3][1]
        lengths = np.isfinite(history.validation).sum(axis=0)
        assert len(set(lengths)) > 1 and lengths.max() == len(history.validation) < 60
        np.testing.assert_array_equal(lengths, history.best_epoch + 3 + 1)
        for k, length in enumerate(lengths):
            assert np.isfinite(history.training[:length, k]).all()
            assert np.isnan(history.validation[length:, k]).all()
            assert np.argmin(history.validation[:length, k]) == history.best_epoch[k]
            assert history.best[k] == history.validation[history.best_epoch[k], k]

    def test_weights_are_those_of_the_best_epoch(self, stopped, data):
        """By hand, for the two networks with squared errors to the truth or the signals."""
        trained, history = stopped[3]
        held_out = ~data.training
        x = estimates(trained, data.signals[held_out])
        error = (x[0] - data.theta[held_out]) / data.mean
        assert history.best[0] == pytest.approx(np.mean(np.sum(error**2, axis=1)), rel=1e-4)
        error = MODEL.signal(x[1]) - data.signals[held_out]
        assert history.best[1] == pytest.approx(np.mean(error**2), rel=1e-3)

    def test_later_epochs_do_not_alter_them(self, stopped):
        begin, all_tasks, options, (trained, history) = stopped
        first = int(np.argmin(history.best_epoch))
        until = int(history.best_epoch[first]) + 1
        short, _ = train(begin, all_tasks, epochs=until, patience=3, **options)
        assert_same_weights(short.at([first]), trained.at([first]))


OPTIONS = {"epochs": 12, "patience": 3, "learning_rate": 0.05, "batch": 50}


@pytest.fixture(scope="module")
def uninterrupted(data):
    return train(networks(data, 4), tasks(data), **OPTIONS)


@pytest.fixture
def every_epoch(monkeypatch):
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", -1.0)


class TestInterruption:
    @pytest.mark.parametrize("epoch", [1, 4, 8])
    @pytest.mark.parametrize("moment", ["_learn", "_validate"])
    def test_it_leaves_no_trace(
        self, data, uninterrupted, every_epoch, tmp_path, monkeypatch, epoch, moment
    ):
        checkpoint = tmp_path / "run.npz"
        as_usual = getattr(training._Run, moment)

        def interrupted(run, *arguments):
            if run.epoch == epoch:
                raise KeyboardInterrupt
            return as_usual(run, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(training._Run, moment, interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(networks(data, 4), tasks(data), checkpoint=checkpoint, **OPTIONS)
        assert len(load_arrays(checkpoint)["validation"]) == epoch
        trained, history = train(networks(data, 4), tasks(data), checkpoint=checkpoint, **OPTIONS)
        assert_same_weights(trained, uninterrupted[0])
        assert_same_history(history, uninterrupted[1])

    def test_a_run_that_had_ended_is_only_read(
        self, data, uninterrupted, every_epoch, tmp_path, monkeypatch
    ):
        """The other worker may have been interrupted."""
        options = {**OPTIONS, "epochs": 60}
        ended = [train(networks(data, 4), tasks(data), checkpoint=tmp_path / "run.npz", **options)]
        assert len(load_arrays(tmp_path / "run.npz")["alive"]) == 0
        monkeypatch.setattr(training._Run, "one_epoch", None)
        ended += [train(networks(data, 4), tasks(data), checkpoint=tmp_path / "run.npz", **options)]
        assert_same_weights(ended[0][0], ended[1][0])
        assert_same_history(ended[0][1], ended[1][1])

    def test_the_checkpoint_of_another_run_is_refused(self, data, every_epoch, tmp_path):
        checkpoint = tmp_path / "run.npz"
        train(networks(data, 4), tasks(data), checkpoint=checkpoint, epochs=1)
        with pytest.raises(ValueError, match="checkpoint is of a run of 4 networks, expected 2"):
            train(networks(data, 2), tasks(data)[:2], checkpoint=checkpoint, epochs=1)
        for shape in ({"width": 12}, {"hidden": 4}, {"hidden": 2}):
            other = Networks(mlp_widths(MODEL, **shape), data.mean, seeds=range(4))
            with pytest.raises(ValueError, match="checkpoint is of networks with weights .*expect"):
                train(other, tasks(data), checkpoint=checkpoint, epochs=1)
        others = {"seed": tasks(data, RECIPES[::-1]), "recipe": tasks(data, RECIPES[:1] * 4)}
        for work in others.values():
            with pytest.raises(ValueError, match="checkpoint is of another run"):
                train(networks(data, 4), work, checkpoint=checkpoint, epochs=2)
        with pytest.raises(ValueError, match="checkpoint is of another run"):
            train(networks(data, 4), tasks(data), checkpoint=checkpoint, epochs=2, batch=64)

    @pytest.mark.slow
    def test_a_kill_leaves_no_trace(self, data, uninterrupted, tmp_path):
        """A process that cannot say goodbye; it is slowed down so that we are in time."""
        checkpoint = tmp_path / "run.npz"
        script = f"""
            import time
            from qmri import training
            import test_training as here
            step = training._Run.one_epoch
            training._Run.one_epoch = lambda *a: (time.sleep(0.3), step(*a))
            training._CHECKPOINT_SECONDS = -1.0
            data = here.labelled()
            options = here.OPTIONS
            here.train(
                here.networks(data, 4), here.tasks(data), checkpoint={str(checkpoint)!r}, **options
            )
        """
        run = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parent
        )
        try:
            wait_for(lambda: checkpoint.exists() and len(load_arrays(checkpoint)["training"]) > 2)
        finally:
            run.kill()
        assert run.wait() == -signal.SIGKILL
        assert 3 <= len(load_arrays(checkpoint)["training"]) < 12
        trained, history = train(networks(data, 4), tasks(data), checkpoint=checkpoint, **OPTIONS)
        assert_same_weights(trained, uninterrupted[0])
        assert_same_history(history, uninterrupted[1])


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def fragile() -> Dataset:
    """A model that breaks down at 2, and noisy signals that lead there from below."""
    model = FunctionModel(
        lambda t, a: a if a < 2 else math.nan,
        [1.0, 2.0],
        [Parameter("a", "a", "1", (1.5, 1.99), (0, 2))],
    )
    rng = np.random.default_rng(7)
    return simulate(model, Gaussian(0.1), model.sample(500, rng), rng)


class TestDivergence:
    def test_steps_that_are_far_too_long(self, data):
        message = r"networks \[0, 1\] was not finite.*smaller learning_rate than 1e\+06"
        with pytest.raises(FloatingPointError, match=message):
            train(networks(data, 2), tasks(data, ["supervised-gt"] * 2), learning_rate=1e6)

    def test_a_network_that_diverges_keeps_its_best_epoch(self, fragile):
        begin = Networks(mlp_widths(fragile.model, width=5), fragile.mean, seeds=[0])
        task = Task(fragile, recipe("self-supervised"))
        trained, history = train(begin, [task], epochs=50, batch=20)
        end = len(history.validation) - 1
        assert history.diverged.all() and np.isnan(history.validation[end, 0])
        assert 0 < end < 50 and 0 <= history.best_epoch[0] < end
        assert history.best[0] == np.nanmin(history.validation)
        assert np.isfinite(estimates(trained, fragile.signals)).all()
        # Up to its best epoch it is any other network.
        short, _ = train(begin, [task], epochs=int(history.best_epoch[0]) + 1, batch=20)
        assert_same_weights(trained, short)

    def test_its_neighbours_notice_nothing(self, fragile):
        begin = Networks(mlp_widths(fragile.model, width=5), fragile.mean, seeds=[0, 1])
        both = [Task(fragile, recipe(name)) for name in ("self-supervised", "supervised-gt")]
        together, history = train(begin, both, epochs=50, batch=20)
        alone, own = train(begin.at([1]), both[1:], epochs=50, batch=20)
        assert history.diverged.tolist() == [True, False]
        np.testing.assert_allclose(history.validation[:, 1], own.validation[:, 0], rtol=1e-3)
        assert_same_weights(together.at([1]), alone, atol=1e-3)


@pytest.fixture
def ctrl_c():
    """Python's answer to Ctrl-C, also where a shell started the tests to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
class TestInParallel:
    def test_it_agrees_with_one_process(self, data, tmp_path):
        begin, five = networks(data, 5), tasks(data, [*RECIPES, "hybrid-0.5"])
        options = {"epochs": 4, "patience": 2}
        one, expected = train(begin, five, **options)
        two, found = train_in_parallel(
            begin, five, workers=2, checkpoint=tmp_path / "run", **options
        )
        assert_same_weights(one, two, atol=1e-5)
        np.testing.assert_allclose(found.validation, expected.validation, rtol=1e-4)
        np.testing.assert_array_equal(found.best_epoch, expected.best_epoch)
        assert not found.diverged.any() and list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("seconds", [0.5, 6.0], ids=["starting", "at work"])
    def test_it_can_be_interrupted(self, data, seconds, ctrl_c):
        """Ctrl-C ends the workers too, at once."""
        begin, both = networks(data, 2), tasks(data)[:2]

        def interrupt():
            wait_for(lambda: len(multiprocessing.active_children()) == 2)
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGINT)

        other = threading.Thread(target=interrupt)
        other.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            train_in_parallel(begin, both, workers=2, epochs=10**9, patience=10**9)
        other.join()
        wait_for(lambda: not multiprocessing.active_children(), 20)
        assert time.monotonic() - start < 60


class TestSetup:
    def test_threads_are_given_back(self, data):
        before = torch.get_num_threads()
        train(networks(data, 1), tasks(data)[:1], epochs=1)
        assert torch.get_num_threads() == before

    def test_one_worker_needs_no_process(self, data, monkeypatch):
        monkeypatch.setattr(training, "ProcessPoolExecutor", None)
        begin = networks(data, 2)
        one, _ = train_in_parallel(begin, tasks(data)[:2], workers=1, epochs=1)
        other, _ = train(begin, tasks(data)[:2], epochs=1)
        assert_same_weights(one, other)

    def test_progress_bar_goes_to_standard_error(self, data, capsys):
        train(networks(data, 1), tasks(data)[:1], epochs=1)
        assert capsys.readouterr() == ("", "")
        train(networks(data, 1), tasks(data)[:1], epochs=1, progress=True)
        shown = capsys.readouterr()
        assert shown.out == "" and "1/1" in shown.err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs must be 1 or more, got 0"),
            ({"patience": 0}, "patience must be 1 or more, got 0"),
            ({"batch": 0}, "batch must be 1 or more, got 0"),
            ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
            ({"learning_rate": np.nan}, "learning_rate must be positive, got nan"),
        ],
    )
    def test_options_that_are_none(self, data, options, message):
        with pytest.raises(ValueError, match=message):
            train(networks(data, 1), tasks(data)[:1], **options)

    def test_a_task_for_each_network(self, data):
        with pytest.raises(ValueError, match="tasks must be 3, one a network, got 4"):
            train(networks(data, 3), tasks(data))

    def test_networks_of_another_acquisition(self, data):
        other = Networks((9, 9, 4), data.mean, seeds=[0])
        message = r"tasks must be to estimate 4 parameters from 9 signals.*IVIM.* and 10 signals"
        with pytest.raises(ValueError, match=message):
            train(other, tasks(data)[:1])

    def test_data_sets_of_one_size_and_split(self, data):
        other = simulate(MODEL, Rician(0.1), data.theta[:500], np.random.default_rng(8))
        both = [Task(data, recipe("supervised-gt")), Task(other, recipe("supervised-gt"))]
        with pytest.raises(ValueError, match="same size and split, got 500 voxels beside 1000"):
            train(networks(data, 2), both)

    @pytest.mark.parametrize("part", ["training", "validation"])
    def test_labels_of_which_none_is_usable(self, data, part):
        label = truth_labels(data.theta)
        label.usable[data.training if part == "training" else ~data.training] = False
        useless = data.with_labels({"mle": label})
        with pytest.raises(ValueError, match=f"must have usable labels, got none for {part}"):
            train(networks(data, 1), [Task(useless, Recipe({"mle": 1.0}))])
