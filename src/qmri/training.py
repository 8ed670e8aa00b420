"""One training loop, for one network or many side by side.

Adam, mini-batches in a new order every epoch, the weights of the best validation epoch kept,
an end when patience runs out. Training can be interrupted at any moment: it resumes from the
last checkpoint and ends with the same weights as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from qmri import losses
from qmri._choices import check_choice
from qmri.artefacts import load_arrays, save_arrays
from qmri.datasets import Dataset, Fingerprints
from qmri.losses import FingerprintLoss, Recipe
from qmri.models import Array, SignalModel
from qmri.networks import FingerprintNetwork, Networks, full_precision, rounded_products

__all__ = [
    "FingerprintHistory",
    "FingerprintTask",
    "History",
    "Task",
    "train",
    "train_fingerprints",
    "train_fingerprints_in_parallel",
    "train_in_parallel",
]

_ROWS = 2000  # validation voxels at once
_CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True)
class Task:
    """What one network is to learn.

    Parameters
    ----------
    dataset : Dataset
    recipe : Recipe
    seed : int
        Of the order in which the network meets its training data.
    """

    dataset: Dataset
    recipe: Recipe
    seed: int = 0


@dataclass(frozen=True, eq=False)
class History:
    """How the training of several networks went.

    Attributes
    ----------
    training, validation : (epochs, networks)
        Mean loss of the epoch; of the weights after the epoch. NaN once a network has stopped.
    best_epoch : (networks,) int
        Epoch whose weights were kept, from 0; -1 if no epoch had a finite loss.
    diverged : (networks,) bool
        Whether a loss was not finite; the network stopped there.
    seconds : float
        Wall time, over all parts of an interrupted run.
    """

    training: Array
    validation: Array
    best_epoch: NDArray[np.int64]
    diverged: NDArray[np.bool_]
    seconds: float

    @property
    def best(self) -> Array:
        """Smallest validation loss of each network, (networks,)."""
        return np.where(self.best_epoch >= 0, _smallest(self.validation), np.nan)


def train(
    networks: Networks,
    tasks: Sequence[Task],
    *,
    epochs: int = 500,
    patience: int = 20,
    batch: int = 128,
    learning_rate: float = 1e-3,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> tuple[Networks, History]:
    """Train each network on its task.

    Parameters
    ----------
    networks : Networks
        Their present weights are where training begins; they are left as they are.
    tasks : sequence of Task
        One for each network; their data sets must agree in size and split.
    epochs : int
        At most.
    patience : int
        A network stops after this many epochs without a lower validation loss.
    batch : int
        Voxels per step.
    learning_rate : float
        Of Adam, with moments of 0.9 and 0.999 and no weight decay.
    checkpoint : path, optional
        File that holds the state of the run; if it exists, the run goes on from there. It is
        refused if it belongs to other tasks, first weights or settings.
    progress : bool
        Show a progress bar.

    Returns
    -------
    networks : Networks
        Trained, each with the weights of its best epoch.
    history : History

    Raises
    ------
    ValueError
        If tasks and networks do not fit together, or no voxel of a task is usable.
    FloatingPointError
        If a network's loss was not finite from its first epoch on: it has learnt nothing.

    References
    ----------
    Optimiser and stopping follow Epstein et al. {cite}`epstein2024labels`; Adam is due to
    Kingma and Ba {cite}`kingma2015adam`.
    """
    for name, value in (("epochs", epochs), ("patience", patience), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value!r}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate!r}")
    if len(tasks) != len(networks):
        raise ValueError(f"tasks must be {len(networks)}, one a network, got {len(tasks)}")
    inputs, outputs = networks.widths[0], networks.widths[-1]
    for model in {id(task.dataset.model): task.dataset.model for task in tasks}.values():
        if (model.measurements, len(model.parameters)) != (inputs, outputs):
            raise ValueError(
                f"tasks must be to estimate {outputs} parameters from {inputs} signals, as the "
                f"networks do, got {model!r} with {len(model.parameters)} parameters and "
                f"{model.measurements} signals"
            )
    run = _Run(networks, _Material(tasks), learning_rate)
    if checkpoint is not None:
        run.identify(networks, batch, patience)
    with _one_thread():
        _carry_out(run, lambda: run.one_epoch(batch, patience), epochs, checkpoint, progress)
    history = run.history()
    if np.any(history.best_epoch < 0):
        lost = np.flatnonzero(history.best_epoch < 0).tolist()
        raise FloatingPointError(
            f"the loss of networks {lost} was not finite from the first epoch on; try a smaller "
            f"learning_rate than {learning_rate:g}"
        )
    return networks.at(range(len(networks))).load(run.best), history


def train_in_parallel(
    networks: Networks,
    tasks: Sequence[Task],
    *,
    workers: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    **options: float,
) -> tuple[Networks, History]:
    """Like `train`, with the networks divided among processes of one thread each.

    Layers of ten units are too small to be worth dividing between threads.

    Parameters
    ----------
    networks, tasks, checkpoint, progress, options
        As for `train`; each process keeps a checkpoint of its own beside the file named.
    workers : int, optional
        Processes; by default one for each core that may be used.
    """
    workers = min(_cores() if workers is None else workers, len(networks))
    if workers <= 1:
        return train(networks, tasks, checkpoint=checkpoint, progress=progress, **options)
    parts = [np.arange(w, len(networks), workers) for w in range(workers)]
    jobs = []
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        for number, part in enumerate(parts):
            file = None if checkpoint is None else f"{checkpoint}.part{number}of{workers}.npz"
            settings = {"checkpoint": file, "progress": progress, **options}
            work = (networks.at(part), [tasks[k] for k in part], settings)
            jobs.append(pool.submit(_train_part, *work))
        results = [_result(job, part) for job, part in zip(jobs, parts, strict=True)]
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    back = np.argsort(np.concatenate(parts))
    arrays, histories = zip(*results, strict=True)
    merged = {name: np.concatenate([a[name] for a in arrays])[back] for name in arrays[0]}
    trained = networks.at(range(len(networks))).load(merged)
    if checkpoint is not None:
        for number in range(workers):
            Path(f"{checkpoint}.part{number}of{workers}.npz").unlink(missing_ok=True)
    return trained, _merged(histories, back)


def _carry_out(
    run: _Run | _FingerprintRun,
    one_epoch: Callable[[], None],
    epochs: int,
    checkpoint: str | Path | None,
    progress: bool,
) -> None:
    """Epoch after epoch, from the checkpoint if there is one, which is written now and then."""
    if checkpoint is not None and Path(checkpoint).exists():
        run.resume(load_arrays(checkpoint))
    began, saved, pause = time.monotonic() - run.seconds, time.monotonic(), _CHECKPOINT_SECONDS
    with tqdm(
        total=epochs, initial=run.epoch, unit="epoch", disable=not progress, desc="training"
    ) as bar:
        while run.epoch < epochs and run.going:
            one_epoch()
            run.seconds = time.monotonic() - began
            bar.update()
            bar.set_postfix(run.summary)
            if checkpoint is not None and time.monotonic() - saved > pause:
                start = time.monotonic()
                save_arrays(checkpoint, run.state())
                saved = time.monotonic()
                # However large the networks, at most a twentieth of the time goes into files.
                pause = _CHECKPOINT_SECONDS * max(1.0, saved - start)


def _result(job: Future, part: NDArray) -> tuple[dict[str, np.ndarray], History]:
    try:
        return job.result()
    except FloatingPointError as error:
        raise FloatingPointError(
            f"counted among networks {part.tolist()}, which shared a process: {error}"
        ) from error


def _cores() -> int:
    usable = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(usable(0)) if usable else os.cpu_count() or 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """No threads: at this size they only wait for each other, on a busy machine for long."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Adam's memory of gradients that have died out ends in numbers below 1e-38, which change no
    # weight and which processors handle so slowly that a step takes half as long again.
    torch.set_flush_denormal(True)


def _end_with_parent() -> None:
    """A parent that is killed ends nobody: its workers would train on, side by side with those
    of the run that takes over."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _train_part(
    networks: Networks, tasks: Sequence[Task], settings: Mapping
) -> tuple[dict[str, np.ndarray], History]:
    trained, history = train(networks, tasks, **settings)
    return trained.arrays(), history


def _merged(histories: Sequence[History], order: NDArray) -> History:
    epochs = max(len(h.training) for h in histories)

    def padded(losses: Array) -> Array:
        missing = np.full((epochs - len(losses), losses.shape[1]), np.nan)
        return np.concatenate([losses, missing])

    return History(
        np.concatenate([padded(h.training) for h in histories], axis=1)[:, order],
        np.concatenate([padded(h.validation) for h in histories], axis=1)[:, order],
        np.concatenate([h.best_epoch for h in histories])[order],
        np.concatenate([h.diverged for h in histories])[order],
        max(h.seconds for h in histories),
    )


class _Material:
    """The data of all tasks as tensors; equal tables are stored once."""

    def __init__(self, tasks: Sequence[Task]):
        first = tasks[0].dataset
        tables, places, self.table = [], {}, []
        for task in tasks:
            if not np.array_equal(task.dataset.training, first.training):
                raise ValueError(
                    "tasks must have data sets of the same size and split, got "
                    f"{len(task.dataset.theta)} voxels beside {len(first.theta)}"
                )
            key = (id(task.dataset), tuple(sorted(task.recipe.labels.items())))
            if key not in places:
                places[key] = len(tables)
                tables.append(_table(task))
            self.table.append(places[key])
        self.rows = torch.from_numpy(np.concatenate(tables))
        self.voxels = len(first.theta)
        self.table = torch.tensor(self.table)
        self.training = torch.from_numpy(np.flatnonzero(first.training))
        self.validation = torch.from_numpy(np.flatnonzero(~first.training))
        self.measurements = first.model.measurements
        weights = np.array([task.recipe.weights(task.dataset) for task in tasks])
        self.weights = torch.from_numpy(weights.astype(np.float32)[:, np.newaxis])
        kinds = [_objective(task) for task in tasks]
        self.kinds = list(dict.fromkeys(kinds))
        self.kind = np.array([self.kinds.index(kind) for kind in kinds])
        self.seeds = [task.seed for task in tasks]

    def take(self, networks: Tensor, voxels: Tensor) -> Tensor:
        """Rows (networks, voxels, ...) of the networks' own tables."""
        places = self.table[networks, None] * self.voxels + voxels
        return self.rows.index_select(0, places.reshape(-1)).reshape(*places.shape, -1)

    def order(self, network: int, epoch: int, cache: dict) -> Tensor:
        """Training voxels in the order of one epoch; it depends on seed and epoch only."""
        seed = self.seeds[network]
        if seed not in cache:
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
            cache[seed] = self.training[torch.from_numpy(rng.permutation(len(self.training)))]
        return cache[seed]

    def signals(self, rows: Tensor) -> Tensor:
        return rows[:, :, : self.measurements]

    def loss(self, networks: NDArray, rows: Tensor, estimate: Tensor) -> Tensor:
        """Loss of each of `networks`, (networks,)."""
        target, usable = rows[:, :, self.measurements : -1], rows[:, :, -1]
        loss = torch.empty(0)
        kinds, order = self.kind[networks], []
        for number in np.unique(kinds):
            error, model = self.kinds[number]
            mine = np.flatnonzero(kinds == number)
            here = slice(None) if len(mine) == len(networks) else torch.from_numpy(mine)
            if error == "signal":
                part = losses.signal_error(estimate[here], self.signals(rows[here]), model)
            else:
                measure = _ERRORS[error]
                weights = self.weights[torch.from_numpy(networks[mine])]
                part = measure(estimate[here], target[here], weights, usable[here])
            loss = torch.cat([loss, part])
            order.append(mine)
        return loss[torch.from_numpy(np.argsort(np.concatenate(order)))]


_ERRORS = {"squared": losses.squared_error, "absolute": losses.absolute_error}


def _objective(task: Task) -> tuple[str, SignalModel | None]:
    """How the errors of a task are measured; through which model, where in signal space."""
    if task.recipe.space == "signal":
        return "signal", task.dataset.model
    return task.recipe.error, None


def _table(task: Task) -> NDArray[np.float32]:
    """Signals, target and usability of each voxel, (voxels, measurements + parameters + 1)."""
    target, usable = task.recipe.target(task.dataset)
    for part, name in ((task.dataset.training, "training"), (~task.dataset.training, "validation")):
        if not usable[part].any():
            raise ValueError(f"tasks must have usable labels, got none for {name}")
    columns = (task.dataset.signals, target, usable[:, np.newaxis])
    return np.concatenate(columns, axis=1, dtype=np.float32)


class _Run:
    """State of a training run: everything that a checkpoint holds."""

    def __init__(self, networks: Networks, material: _Material, learning_rate: float):
        self.material, self.learning_rate = material, learning_rate
        count = len(networks)
        self.alive = np.arange(count)
        self.best = networks.arrays()
        self.best_epoch = np.full(count, -1)
        self.best_loss = np.full(count, np.inf)
        self.diverged = np.zeros(count, dtype=bool)
        self.training: list[Array] = []
        self.validation: list[Array] = []
        self.seconds = 0.0
        self.fingerprint = ""
        self._seat(networks.at(range(count)), None)

    @property
    def epoch(self) -> int:
        return len(self.validation)

    @property
    def going(self) -> bool:
        return len(self.alive) > 0

    @property
    def summary(self) -> dict[str, str | int]:
        """Networks at work, and their mean validation loss after the latest epoch."""
        latest = self.validation[-1][np.isfinite(self.validation[-1])]
        loss = float(latest.mean()) if len(latest) else float("nan")
        return {"networks": len(self.alive), "loss": f"{loss:.4g}"}

    def _seat(self, networks: Networks, moments: Mapping[str, list[Tensor]] | None) -> None:
        """Put networks to work, with Adam's memory of them."""
        self.networks = networks
        self.parameters = list(networks.parameters())
        self.optimiser = torch.optim.Adam(
            self.parameters, lr=self.learning_rate, betas=(0.9, 0.999), fused=True
        )
        if moments is not None:
            for p, parameter in enumerate(self.parameters):
                self.optimiser.state[parameter] = {
                    "step": moments["step"][p].clone(),
                    "exp_avg": moments["exp_avg"][p].clone(),
                    "exp_avg_sq": moments["exp_avg_sq"][p].clone(),
                }

    def _moments(self) -> dict[str, list[Tensor]]:
        states = [self.optimiser.state[parameter] for parameter in self.parameters]
        return {name: [state[name] for state in states] for name in _ADAM}

    def one_epoch(self, batch: int, patience: int) -> None:
        total = len(self.material.table)
        training, validation = np.full(total, np.nan), np.full(total, np.nan)
        training[self.alive] = self._learn(batch)
        validation[self.alive] = loss = self._validate()
        epoch = self.epoch
        self.training.append(training)
        self.validation.append(validation)

        better = loss < self.best_loss[self.alive]
        weights = self.networks.arrays()
        for name, kept in self.best.items():
            kept[self.alive[better]] = weights[name][better]
        self.best_loss[self.alive[better]] = loss[better]
        self.best_epoch[self.alive[better]] = epoch

        diverged = ~np.isfinite(loss)
        self.diverged[self.alive[diverged]] = True
        going = ~diverged & (epoch - self.best_epoch[self.alive] < patience)
        if not going.all():
            stay = np.flatnonzero(going)
            self.alive = self.alive[stay]
            if len(stay):
                moments = self._moments()
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name] = [value[torch.from_numpy(stay)] for value in moments[name]]
                self._seat(self.networks.at(stay), moments)

    def _learn(self, batch: int) -> Array:
        material, cache = self.material, {}
        networks = torch.from_numpy(self.alive)
        order = torch.stack([material.order(k, self.epoch, cache) for k in self.alive])
        total = torch.zeros(len(self.alive), dtype=torch.float64)
        voxels = order.shape[1]
        for first in range(0, voxels, batch):
            rows = material.take(networks, order[:, first : first + batch])
            loss = material.loss(self.alive, rows, self.networks(material.signals(rows)))
            self.optimiser.zero_grad(set_to_none=True)
            loss.sum().backward()
            self.optimiser.step()
            total += loss.detach() * rows.shape[1]
        return (total / voxels).numpy()

    def _validate(self) -> Array:
        material = self.material
        networks = torch.from_numpy(self.alive)
        total = torch.zeros(len(self.alive), dtype=torch.float64)
        weight = torch.zeros(len(self.alive), dtype=torch.float64)
        with torch.inference_mode():
            for first in range(0, len(material.validation), _ROWS):
                voxels = material.validation[first : first + _ROWS].expand(len(self.alive), -1)
                rows = material.take(networks, voxels)
                loss = material.loss(self.alive, rows, self.networks(material.signals(rows)))
                share = rows[:, :, -1].sum(dim=1)
                total += loss * share
                weight += share
        return (total / weight).numpy()

    def history(self) -> History:
        return History(
            np.array(self.training), np.array(self.validation), self.best_epoch.copy(),
            self.diverged.copy(), self.seconds,
        )  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        arrays = {f"best.{name}": value for name, value in self.best.items()}
        arrays |= {f"now.{name}": value for name, value in self.networks.arrays().items()}
        for name, values in self._moments().items():
            arrays |= {f"{name}.{p}": value.numpy() for p, value in enumerate(values)}
        for name in _STATE:
            arrays[name] = np.array(getattr(self, name))
        return arrays | {"fingerprint": np.array(self.fingerprint)}

    def identify(self, networks: Networks, batch: int, patience: int) -> None:
        """Set the fingerprint of all that the result depends on but the number of epochs."""
        digest = hashlib.sha256(self.material.rows.numpy().tobytes())
        parts = (self.material.weights, self.material.table, self.material.training)
        for values in (*(part.numpy() for part in parts), *networks.arrays().values()):
            digest.update(values.tobytes())
        kinds = [kind for kind, _ in self.material.kinds]
        numbers = (self.learning_rate, batch, patience, self.material.seeds, kinds)
        digest.update(repr((*numbers, self.material.kind.tolist())).encode())
        self.fingerprint = digest.hexdigest()

    def resume(self, arrays: Mapping[str, np.ndarray]) -> None:
        if len(arrays["best_epoch"]) != len(self.best_epoch):
            raise ValueError(
                f"checkpoint is of a run of {len(arrays['best_epoch'])} networks, expected "
                f"{len(self.best_epoch)}"
            )
        shapes = {name: value.shape for name, value in self.best.items()}
        kept = {n[5:]: value.shape for n, value in arrays.items() if n.startswith("best.")}
        if kept != shapes:
            raise ValueError(f"checkpoint is of networks with weights {kept}, expected {shapes}")
        _refuse_another(arrays, self.fingerprint)
        for name in _STATE:
            value = arrays[name]
            setattr(self, name, list(value) if name in ("training", "validation") else value)
        self.seconds = float(self.seconds)
        self.best = {name: arrays[f"best.{name}"] for name in self.best}
        if len(self.alive) == 0:
            return
        now = Networks(self.networks.widths, self.networks.scale.numpy(), [0] * len(self.alive))
        now.load({name: arrays[f"now.{name}"] for name in self.best})
        count = len(self.parameters)
        self._seat(
            now,
            {n: [torch.from_numpy(arrays[f"{n}.{p}"]) for p in range(count)] for n in _ADAM},
        )


def _refuse_another(arrays: Mapping[str, np.ndarray], fingerprint: str) -> None:
    if str(arrays.get("fingerprint")) != fingerprint:
        raise ValueError(
            "checkpoint is of another run: its tasks, first weights or settings differ; "
            "remove the file to start anew"
        )


_ADAM = ("step", "exp_avg", "exp_avg_sq")
_STATE = ("alive", "best_epoch", "best_loss", "diverged", "training", "validation", "seconds")


def _smallest(validation: Array) -> Array:
    return np.min(np.where(np.isnan(validation), np.inf, validation), axis=0)


# Fingerprints: one deep network at a time


_TARGETS = ("m0s", "T1", "T2f")
_MEASURES = ("crb", "squared", "relative")
SCHEDULES = ("step", "cosine")


@dataclass(frozen=True, eq=False)
class FingerprintHistory:
    """How the training of a network for fingerprints went.

    Attributes
    ----------
    training : (epochs,)
        Mean loss over the steps of the epoch.
    validation : dict of str to (epochs, targets)
        After the epoch, on validation fingerprints whose M0 and noise never change: the mean of
        each parameter's squared error over its Cramer-Rao bound (``"crb"``), squared error
        (``"squared"``) and absolute error over the truth (``"relative"``).
    learning_rate : (epochs,)
        At the end of the epoch.
    best_epoch : int
        Of the smallest validation loss, by the measure and the parameters trained for, from 0.
    seconds : float
        Wall time, over all parts of an interrupted run.
    """

    training: Array
    validation: Mapping[str, Array]
    learning_rate: Array
    best_epoch: int
    seconds: float


def train_fingerprints(
    network: FingerprintNetwork,
    training: Fingerprints,
    validation: Fingerprints,
    loss: FingerprintLoss,
    *,
    epochs: int = 400,
    batch: int = 512,
    learning_rate: float = 0.01,
    schedule: str = "step",
    seed: int = 0,
    sigma: float = 0.01,
    magnitude: tuple[float, float] = (0.1, 1.0),
    conjugation: NDArray | None = None,
    clip: float | None = None,
    single_precision: float = 1.0,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> tuple[FingerprintNetwork, FingerprintHistory]:
    """Train a network on fingerprints, whose M0 and noise are drawn anew in every epoch.

    Parameters
    ----------
    network : FingerprintNetwork
        Its present weights are where training begins; it is left as it is.
    training, validation : Fingerprints
        Without noise.
    loss : FingerprintLoss
    epochs : int
        All of them are run; the rate of learning falls according to their number.
    batch : int
        Fingerprints per step; those left over after whole steps wait for the next epoch's
        order.
    learning_rate : float
        Of Adam at the beginning, with moments of 0.9 and 0.999 and no weight decay.
    schedule : {"step", "cosine"}
        Halved at the end of each tenth of the epochs, or falling to zero along a cosine, after
        a rise over the first fiftieth.
    seed : int
        Of M0, noise and order; what is drawn depends on it and on the number of the epoch.
    sigma : float
        Standard deviation of the noise of each real and imaginary part.
    magnitude : (float, float)
        |M0| is uniform between these, and so is its phase over the circle.
    conjugation : (rank, rank), optional
        Mirrors half of the training fingerprints; see `Fingerprints.noisy`.
    clip : float, optional
        Largest norm of a gradient; longer ones are shortened to it. A few fingerprints with a
        very small bound can make a gradient hundreds of times longer than usual.
    single_precision : float
        Share of the epochs, the last ones, whose matrix products have single precision. In the
        others factors of wide layers are rounded to eight binary digits where the processor
        is faster with them.
    checkpoint : path, optional
        File that holds the state of the run; if it exists, the run goes on from there. It is
        refused if it belongs to other data, first weights or settings.
    progress : bool
        Show a progress bar.

    Returns
    -------
    network : FingerprintNetwork
        With the weights after the last epoch.
    history : FingerprintHistory

    Raises
    ------
    ValueError
        If network, data and settings do not fit together.
    FloatingPointError
        If the loss is no longer finite.

    References
    ----------
    Zhang et al. {cite}`zhang2022crb`; Adam is due to Kingma and Ba {cite}`kingma2015adam`.
    """
    for name, value in (("epochs", epochs), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value!r}")
    if batch > len(training):
        raise ValueError(f"batch must be at most {len(training)}, the training set, got {batch}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate!r}")
    check_choice("schedule", schedule, SCHEDULES)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip!r}")
    if not 0 <= single_precision <= 1:
        raise ValueError(f"single_precision must be a share from 0 to 1, got {single_precision!r}")
    for name, data in (("training", training), ("validation", validation)):
        if (data.rank, data.crb.shape[1]) != (network.rank, network.widths[-1]):
            raise ValueError(
                f"{name} must be to estimate {network.widths[-1]} parameters from {network.rank} "
                f"coefficients, as the network does, got {data.crb.shape[1]} from {data.rank}"
            )
    settings = {
        "epochs": epochs,
        "batch": batch,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "seed": seed,
        "sigma": sigma,
        "magnitude": tuple(magnitude),
        "single_precision": single_precision,
        "clip": clip,
    }
    run = _FingerprintRun(network.copy(), training, validation, loss, settings, conjugation)
    _carry_out(run, run.one_epoch, epochs, checkpoint, progress)
    if checkpoint is not None:
        save_arrays(checkpoint, run.state())
    return run.network, run.history()


@dataclass(frozen=True, eq=False)
class FingerprintTask:
    """One of several networks to be trained on the same fingerprints.

    Attributes
    ----------
    network : FingerprintNetwork
    loss : FingerprintLoss
    options : mapping
        Keywords for `train_fingerprints`, such as ``epochs`` and ``seed``.
    """

    network: FingerprintNetwork
    loss: FingerprintLoss
    options: Mapping


def train_fingerprints_in_parallel(
    tasks: Mapping[str, FingerprintTask],
    training: Fingerprints,
    validation: Fingerprints,
    *,
    workers: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> dict[str, tuple[FingerprintNetwork, FingerprintHistory]]:
    """Like `train_fingerprints` for each task, several at a time, in processes of one thread.

    Two networks with a thread each are trained sooner than one after the other with two threads.

    Parameters
    ----------
    tasks : mapping of name to FingerprintTask
        Begun in this order.
    training, validation : Fingerprints
        As for `train_fingerprints`.
    workers : int, optional
        Processes; by default one for each core that may be used.
    checkpoint : path, optional
        Each network keeps a file of its own beside it, also when it is finished; they are
        removed at the end. What was interrupted goes on from there.
    progress : bool
        Show a progress bar of finished networks.

    Returns
    -------
    dict of name to (network, history)
        As `train_fingerprints` returns them.
    """
    workers = min(_cores() if workers is None else workers, len(tasks))
    files = {
        name: None if checkpoint is None else f"{checkpoint}.{number}.npz"
        for number, name in enumerate(tasks)
    }
    found = {}
    with tqdm(total=len(tasks), unit="network", disable=not progress, desc="networks") as bar:
        for name, arrays, history in _finished(tasks, (training, validation), files, workers):
            found[name] = tasks[name].network.copy().load(arrays), history
            bar.set_postfix({name: f"{history.validation['crb'][-1].mean():.3g}"})
            bar.update()
    for file in files.values():
        if file is not None:
            Path(file).unlink(missing_ok=True)
    return {name: found[name] for name in tasks}


def _finished(
    tasks: Mapping[str, FingerprintTask],
    data: tuple[Fingerprints, Fingerprints],
    files: Mapping[str, str | None],
    workers: int,
) -> Iterator[tuple[str, dict[str, np.ndarray], FingerprintHistory]]:
    """Name, weights and history of each network as it is finished."""
    if workers <= 1:
        for name, task in tasks.items():
            yield name, *_train_task(task, data, files[name])
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_fingerprint_worker, (data,)
    )
    try:
        jobs = {pool.submit(_train_here, task, files[name]): name for name, task in tasks.items()}
        for job in as_completed(jobs):
            try:
                yield jobs[job], *job.result()
            except FloatingPointError as error:
                raise FloatingPointError(f"network {jobs[job]!r}: {error}") from error
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_here: list[tuple[Fingerprints, Fingerprints]] = []  # the data of a worker, sent to it once


def _start_fingerprint_worker(data: tuple[Fingerprints, Fingerprints]) -> None:
    _start_worker()
    _here[:] = [data]


def _train_here(
    task: FingerprintTask, checkpoint: str | None
) -> tuple[dict[str, np.ndarray], FingerprintHistory]:
    return _train_task(task, _here[0], checkpoint)


def _train_task(
    task: FingerprintTask, data: tuple[Fingerprints, Fingerprints], checkpoint: str | None
) -> tuple[dict[str, np.ndarray], FingerprintHistory]:
    with _one_thread():
        network, history = train_fingerprints(
            task.network, *data, task.loss, checkpoint=checkpoint, **task.options
        )
    return network.arrays(), history


class _FingerprintRun:
    """State of the training of a network for fingerprints: everything that a checkpoint holds."""

    def __init__(
        self,
        network: FingerprintNetwork,
        training: Fingerprints,
        validation: Fingerprints,
        loss: FingerprintLoss,
        settings: Mapping,
        conjugation: NDArray | None,
    ):
        self.network, self.data, self.loss, self.settings = network, training, loss, settings
        self.conjugation = conjugation
        self.parameters = list(network.parameters())
        self.optimiser = torch.optim.Adam(
            self.parameters, lr=settings["learning_rate"], betas=(0.9, 0.999), fused=True
        )
        self.training: list[float] = []
        self.validation: dict[str, list[Array]] = {measure: [] for measure in _MEASURES}
        self.rate: list[float] = []
        self.seconds, self.going = 0.0, True
        noisy = validation.noisy(self._rng(0), settings["sigma"], settings["magnitude"])
        self.held_out = network.inputs(noisy.coefficients)
        self.truth = torch.from_numpy(noisy.targets.copy())
        self.measures = {m: FingerprintLoss(m) for m in _MEASURES}
        self.factors = {
            m: torch.from_numpy(loss.weights(noisy.targets, noisy.crb, _TARGETS))
            for m, loss in self.measures.items()
        }
        self.fingerprint = self._identify()

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.settings["seed"], spawn_key=key))

    def _identify(self) -> str:
        """Of all that the result depends on."""
        digest = hashlib.sha256(repr((self.settings, self.network.settings, self.loss)).encode())
        data = (self.data.coefficients, self.data.theta, self.data.crb)
        held_out = (self.held_out.numpy(), self.truth.numpy())
        mirror = () if self.conjugation is None else (np.asarray(self.conjugation),)
        for values in (*data, *held_out, *mirror, *self.network.arrays().values()):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    @property
    def epoch(self) -> int:
        return len(self.training)

    @property
    def summary(self) -> dict[str, str]:
        now = {name: values[-1].mean() for name, values in self.validation.items()}
        return {"loss": f"{self.training[-1]:.4g}", "crb": f"{now['crb']:.4g}"}

    def one_epoch(self) -> None:
        epoch, batch, epochs = self.epoch, self.settings["batch"], self.settings["epochs"]
        rng = self._rng(1, epoch)
        noisy = self.data.noisy(
            rng, self.settings["sigma"], self.settings["magnitude"], self.conjugation
        )
        inputs = self.network.inputs(noisy.coefficients)
        truth = torch.from_numpy(noisy.targets.astype(np.float32))
        weights = self.loss.weights(noisy.targets, noisy.crb, _TARGETS).astype(np.float32)
        weights = torch.from_numpy(weights)
        order = torch.from_numpy(rng.permutation(len(self.data)))
        steps, total = len(self.data) // batch, 0.0
        fast = epoch < (1 - self.settings["single_precision"]) * epochs
        with rounded_products() if fast else full_precision():
            for step in range(steps):
                chosen = order[step * batch : (step + 1) * batch]
                rate = _rate(self.settings, (epoch + step / steps) / epochs)
                self.optimiser.param_groups[0]["lr"] = rate
                error = self.network(inputs[chosen]) - truth[chosen]
                loss = (weights[chosen] * error.abs().pow(self.loss.power)).mean()
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                if self.settings["clip"] is not None:
                    torch.nn.utils.clip_grad_norm_(self.parameters, self.settings["clip"])
                self.optimiser.step()
                total += float(loss.detach())
        if not np.isfinite(total):
            raise FloatingPointError(
                f"the loss was no longer finite in epoch {epoch}; try a smaller learning_rate than "
                f"{self.settings['learning_rate']:g}"
            )
        self.training.append(total / steps)
        self.rate.append(rate)
        self._validate()

    def _validate(self) -> None:
        with torch.inference_mode(), full_precision():
            parts = [self.network(part) for part in self.held_out.split(_ROWS)]
        error = (torch.cat(parts).double() - self.truth).abs()
        for name, loss in self.measures.items():
            mean = (self.factors[name] * error.pow(loss.power)).mean(dim=0)
            self.validation[name].append(mean.numpy())

    def history(self) -> FingerprintHistory:
        validation = {name: np.array(values) for name, values in self.validation.items()}
        own = validation[self.loss.measure]
        if self.loss.only is not None:
            own = own[:, [_TARGETS.index(self.loss.only)]]
        return FingerprintHistory(
            np.array(self.training), validation, np.array(self.rate),
            int(own.mean(axis=1).argmin()), self.seconds,
        )  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        arrays = {f"now.{name}": value for name, value in self.network.arrays().items()}
        for name in _ADAM:
            for p, parameter in enumerate(self.parameters):
                arrays[f"{name}.{p}"] = self.optimiser.state[parameter][name].numpy()
        arrays |= {f"validation.{name}": np.array(v) for name, v in self.validation.items()}
        arrays |= {"training": np.array(self.training), "rate": np.array(self.rate)}
        return arrays | {
            "seconds": np.array(self.seconds),
            "fingerprint": np.array(self.fingerprint),
        }

    def resume(self, arrays: Mapping[str, np.ndarray]) -> None:
        _refuse_another(arrays, self.fingerprint)
        self.network.load(
            {n.removeprefix("now."): v for n, v in arrays.items() if n.startswith("now.")}
        )
        for p, parameter in enumerate(self.parameters):
            self.optimiser.state[parameter] = {
                name: torch.from_numpy(arrays[f"{name}.{p}"]) for name in _ADAM
            }
        self.training, self.rate = arrays["training"].tolist(), arrays["rate"].tolist()
        self.validation = {name: list(arrays[f"validation.{name}"]) for name in _MEASURES}
        self.seconds = float(arrays["seconds"])


def _rate(settings: Mapping, share: float) -> float:
    """Rate of learning when `share` of the run is done."""
    if settings["schedule"] == "step":
        return settings["learning_rate"] * 0.5 ** int(10 * share + 1e-9)
    rise = min(1.0, share / 0.02 + 0.01)
    return settings["learning_rate"] * rise * (1 + math.cos(math.pi * share)) / 2
