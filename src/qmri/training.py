"""One training loop, for one network or many side by side.

Adam, mini-batches in a new order every epoch, the weights of the best validation epoch kept,
an end when patience runs out. Training can be interrupted at any moment: it resumes from the
last checkpoint and ends with the same weights as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
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
from qmri.artefacts import load_arrays, save_arrays
from qmri.datasets import Dataset
from qmri.losses import Recipe
from qmri.models import Array, SignalModel
from qmri.networks import Networks

__all__ = ["History", "Task", "train", "train_in_parallel"]

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
        if Path(checkpoint).exists():
            run.restore(load_arrays(checkpoint))
    began, saved = time.monotonic() - run.seconds, time.monotonic()
    with (
        _one_thread(),
        tqdm(
            total=epochs, initial=run.epoch, unit="epoch", disable=not progress, desc="training"
        ) as bar,
    ):
        while run.epoch < epochs and len(run.alive):
            run.one_epoch(batch, patience)
            run.seconds = time.monotonic() - began
            bar.update()
            bar.set_postfix(networks=len(run.alive), loss=f"{run.loss:.4g}")
            if checkpoint is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                save_arrays(checkpoint, run.state())
                saved = time.monotonic()
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
    def loss(self) -> float:
        """Mean validation loss of the latest epoch, over the networks where it is finite."""
        latest = self.validation[-1][np.isfinite(self.validation[-1])]
        return float(latest.mean()) if len(latest) else float("nan")

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

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        if len(arrays["best_epoch"]) != len(self.best_epoch):
            raise ValueError(
                f"checkpoint is of a run of {len(arrays['best_epoch'])} networks, expected "
                f"{len(self.best_epoch)}"
            )
        shapes = {name: value.shape for name, value in self.best.items()}
        kept = {n[5:]: value.shape for n, value in arrays.items() if n.startswith("best.")}
        if kept != shapes:
            raise ValueError(f"checkpoint is of networks with weights {kept}, expected {shapes}")
        if str(arrays.get("fingerprint")) != self.fingerprint:
            raise ValueError(
                "checkpoint is of another run: its tasks, first weights or settings differ; "
                "remove the file to start anew"
            )
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


_ADAM = ("step", "exp_avg", "exp_avg_sq")
_STATE = ("alive", "best_epoch", "best_loss", "diverged", "training", "validation", "seconds")


def _smallest(validation: Array) -> Array:
    return np.min(np.where(np.isnan(validation), np.inf, validation), axis=0)
