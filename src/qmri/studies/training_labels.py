"""The study of training labels: every network of the first paper, trained, tested and timed.

``qmri study training-labels --scale quick|paper`` runs it; `Results` reads what it leaves.
Epstein et al. {cite}`epstein2024labels`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from qmri import pretrained
from qmri._choices import check_choice
from qmri.artefacts import Stages, StudyResults, carry_out, study_name, with_prefix
from qmri.datasets import Dataset, Labels, mle_labels, simulate
from qmri.evaluation import Grid, GridAccumulator, GridStatistics, blocks
from qmri.losses import Recipe, recipe
from qmri.mle import fit_mle
from qmri.models import IVIM, Array
from qmri.networks import NetworkEstimator, Networks, mlp_widths
from qmri.noise import Gaussian, Noise, Rician
from qmri.studies import black_box
from qmri.training import History, Task, train_in_parallel

__all__ = ["PROTOCOLS", "SCALES", "Protocol", "Results", "Scale", "run"]


ALPHAS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
RECIPES = (
    "supervised-gt",
    "self-supervised",
    "supervised-mle-rician",
    "supervised-mle-gaussian",
    *(f"hybrid-{alpha:g}" for alpha in ALPHAS),
    "supervised-mle-rician-f",
    "supervised-mle-rician-dslow",
    "supervised-mle-rician-dfast",
    "supervised-gt-mae",
    "supervised-mle-rician-mae",
)
# The same, taught also by the labels that lie on a bound, to see what holding them out does.
KEPT = {
    "supervised-mle-rician-kept": Recipe({"mle-rician-kept": 1.0}),
    "supervised-mle-rician-dfast-kept": Recipe({"mle-rician-kept": 1.0}, emphasis={"Dfast": 1e6}),
}
# Networks whose errors are also taken over those signals only whose MLE lies inside the bounds.
INSIDE = (
    "supervised-gt",
    "self-supervised",
    "supervised-mle-rician",
    "supervised-mle-rician-f",
    "supervised-mle-rician-dslow",
    "supervised-mle-rician-dfast",
    *KEPT,
)
FEWEST_INSIDE = 10  # signals of a node
NOISES = {"mle-rician": Rician, "mle-gaussian": Gaussian}
SHAPES = {"standard": {}, "wide": {"width": 150}, "deep": {"hidden": 10}}
SHAPE_RECIPES = ("supervised-gt", "supervised-mle-rician")
POINTS = 10
# Settings of the further questions.
_FURTHER = {
    "wide", "shape_epochs", "simulated", "simulated_epochs", "timed_fits", "timed_steps",
}  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """An acquisition to train networks for, and what is asked of them.

    Attributes
    ----------
    bvalues : tuple of float
        s/mm2.
    snrs : tuple of int
        S0 / sigma, one data set each.
    recipes : tuple of str
        Networks trained at each SNR.
    restarts, replicates : int
        At most: a scale may ask for fewer.
    further : bool
        Whether the paper's further questions are asked of the networks: labels on a bound kept,
        signals inside the bounds, other shapes, a simulator without derivative, the time that
        the usual loops take.
    """

    bvalues: tuple[float, ...]
    snrs: tuple[int, ...]
    recipes: tuple[str, ...] = RECIPES
    restarts: int = 16
    replicates: int = 3
    further: bool = True


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes
    ----------
    voxels : int
        Synthetic signals at each SNR, a fifth of them for validation.
    restarts : int
        Networks trained from scratch on the truth. The best by validation loss begins all
        others, as in the paper.
    replicates : int
        Repetitions of all training, in another order each: the second begins from the second
        best restart, and so on.
    epochs, patience, batch : int
        As for :func:`qmri.training.train`.
    repeats : int
        Noisy signals at each node of the test grid.
    wide, shape_epochs : int
        Networks trained of the wide shape, for each of two recipes (twice as many of the
        others), and epochs at most.
    simulated, simulated_epochs : int
        Signals of the simulator without a derivative, and epochs at most.
    timed_fits, timed_steps : int
        Size of the slice on which the straightforward way is timed.
    """

    voxels: int
    restarts: int
    replicates: int
    epochs: int
    patience: int
    batch: int
    repeats: int
    wide: int
    shape_epochs: int
    simulated: int
    simulated_epochs: int
    timed_fits: int
    timed_steps: int


PROTOCOLS: Mapping[str, Protocol] = {
    "paper": Protocol((0, 10, 20, 30, 50, 80, 100, 200, 400, 800), (15, 30)),
    # S0 of training reaches 20 % to either side, so that these SNRs leave no gap from 4 to 38.
    "abdomen": Protocol(
        (0, 10, 25, 50, 100, 200, 300, 400, 500),
        (5, 7, 10, 15, 22, 32),
        recipes=(
            "supervised-gt",
            "self-supervised",
            "supervised-mle-rician",
            "supervised-mle-gaussian",
            "hybrid-0.5",
        ),
        restarts=8,
        replicates=1,
        further=False,
    ),
}
SCALES: Mapping[str, Scale] = {
    "quick": Scale(
        voxels=20_000,
        restarts=4,
        replicates=3,
        epochs=40,
        patience=10,
        batch=128,
        repeats=50,
        wide=1,
        shape_epochs=40,
        simulated=8_000,
        simulated_epochs=150,
        timed_fits=50,
        timed_steps=50,
    ),
    "paper": Scale(
        voxels=100_000,
        restarts=16,
        replicates=3,
        epochs=400,
        patience=20,
        batch=128,
        repeats=500,
        wide=1,
        shape_epochs=150,
        simulated=20_000,
        simulated_epochs=250,
        timed_fits=200,
        timed_steps=500,
    ),
}


def run(
    scale: str,
    protocol: str = "paper",
    seed: int = 0,
    out: str | Path | None = None,
    fresh: bool = False,
) -> Path:
    """Run the study, or go on with one that was interrupted.

    Parameters
    ----------
    scale : {"quick", "paper"}
    protocol : {"paper", "abdomen"}
    seed : int
        All random numbers follow from it.
    out : path, optional
        Folder for the results; by default the one that the book reads.
    fresh : bool
        Forget what an earlier run has finished.

    Returns
    -------
    pathlib.Path
        Folder with ``manifest.json``, the networks, and the statistics of the test grid.

    Raises
    ------
    ValueError
        If `scale` or `protocol` is unknown, or the work folder holds another run's stages.
    """
    check_choice("scale", scale, SCALES)
    name = study_name("training-labels", protocol, PROTOCOLS)
    asked = PROTOCOLS[protocol]
    study = (_WholeStudy if asked.further else _Study)(SCALES[scale], asked, seed)
    return carry_out(
        name, study.compute, study.settings, scale=scale, seed=seed, protocol=protocol, out=out,
        fresh=fresh,
    )  # fmt: skip


class _Tested(NamedTuple):
    """What every protocol leaves; the last two by SNR."""

    restarts: dict[str, Array]
    networks: dict[str, Array]
    likelihood: dict[int, dict[str, Array]]
    statistics: dict[int, dict[str, Array]]


class _Study:
    """Networks trained and tested; each stage depends on earlier ones and the settings alone."""

    def __init__(self, scale: Scale, protocol: Protocol, seed: int):
        scale = replace(
            scale,
            restarts=min(scale.restarts, protocol.restarts),
            replicates=min(scale.replicates, protocol.replicates),
        )
        if scale.replicates > scale.restarts:
            raise ValueError(
                f"replicates must not be more than restarts, {scale.restarts}, since each begins "
                f"from another one, got {scale.replicates}"
            )
        self.scale, self.seed, self.recipes = scale, seed, protocol.recipes
        self.model = IVIM(protocol.bvalues)
        self.grid = Grid.regular(self.model, POINTS)
        self.snrs, self.high = protocol.snrs, max(protocol.snrs)
        self.options = {
            "epochs": scale.epochs, "patience": scale.patience, "batch": scale.batch,
            "progress": True,
        }  # fmt: skip

    @property
    def settings(self) -> dict:
        return {
            **{name: value for name, value in vars(self.scale).items() if name not in _FURTHER},
            "bvalues": list(self.model.bvalues),
            "snrs": list(self.snrs),
            "recipes": list(self.recipes),
            "points": POINTS,
        }

    def compute(self, stages: Stages) -> tuple[dict[str, Mapping], dict]:
        """All stages; returns the files to keep and the numbers for the manifest."""
        tested = self._trained_and_tested(stages)
        return self._files(tested), self._results(tested)

    def _trained_and_tested(self, stages: Stages) -> _Tested:
        labels = {
            snr: stages.run(f"labels-snr{snr}", lambda snr=snr: self._labels(snr))
            for snr in self.snrs
        }
        self.datasets = {snr: self._labelled(snr, labels[snr]) for snr in self.snrs}
        restarts = stages.run("restarts", lambda: self._restarts(stages.path("restarts")))
        table = {name: recipe(name) for name in self.recipes}
        networks = stages.run(
            "networks", lambda: self._networks(stages.path("networks"), restarts, table)
        )
        likelihood = {
            snr: stages.run(f"mle-snr{snr}", lambda snr=snr: self._mle(snr)) for snr in self.snrs
        }
        statistics = {
            snr: stages.run(f"test-snr{snr}", lambda snr=snr: self._test(snr, networks, table))
            for snr in self.snrs
        }
        return _Tested(restarts, networks, likelihood, statistics)

    def _files(self, tested: _Tested) -> dict[str, dict]:
        weights = {k: v for k, v in tested.networks.items() if not k.startswith("history/")}
        weights |= {"widths": np.array(mlp_widths(self.model)), "scale": self._mean()}
        histories = {"restarts": tested.restarts, "networks": tested.networks}
        files = {
            pretrained.FILE: weights,
            "training.npz": {
                f"{stage}/{k}": v
                for stage, arrays in histories.items()
                for k, v in with_prefix(arrays, "history/").items()
            },
        }
        for snr in self.snrs:
            likelihood = with_prefix(tested.likelihood[snr], "grid/")
            files[f"grid-snr{snr}.npz"] = {**likelihood, **tested.statistics[snr]}
        return files

    def _results(self, tested: _Tested) -> dict:
        shares = {snr: with_prefix(tested.likelihood[snr], "share/") for snr in self.snrs}
        return {
            "labels": {f"snr{snr}": self._label_results(snr) for snr in self.snrs},
            "maximum-likelihood": {
                f"snr{snr}": {k: float(v) for k, v in found.items()}
                for snr, found in shares.items()
            },
        }

    # --- stages ------------------------------------------------------------------------------

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def _dataset(self, snr: int) -> Dataset:
        """The same tissue at every SNR."""
        tissue = self.model.sample(self.scale.voxels, self._rng(0))
        return simulate(self.model, Rician(1 / snr), tissue, self._rng(1, snr))

    def _labels(self, snr: int) -> dict[str, Array]:
        arrays, dataset = {}, self._dataset(snr)
        for name, kind in NOISES.items():
            label = mle_labels(dataset, kind(1 / snr), progress=True)
            arrays |= {f"{name}/{k}": v for k, v in vars(label).items()}
        return arrays

    def _labelled(self, snr: int, arrays: Mapping) -> Dataset:
        dataset = self._dataset(snr)
        labels = {name: Labels(**with_prefix(arrays, f"{name}/")) for name in NOISES}
        rician = labels["mle-rician"]
        everywhere = np.isfinite(rician.values).all(axis=1)
        labels["mle-rician-kept"] = replace(rician, usable=everywhere)
        return dataset.with_labels(labels)

    def _mean(self) -> Array:
        return self.datasets[self.high].mean

    def _fresh(self, count: int, stream: int, **shape: int) -> Networks:
        seeds = self._rng(2, stream).integers(2**31, size=count).tolist()
        return Networks(mlp_widths(self.model, **shape), self._mean(), seeds)

    def _restarts(self, checkpoint: Path) -> dict[str, Array]:
        """Networks on the truth from many first weights; the best ones begin all others."""
        scale = self.scale
        task = recipe("supervised-gt")
        tasks = [
            Task(self.datasets[self.high], task, self._order(k)) for k in range(scale.restarts)
        ]
        trained, history = train_in_parallel(
            self._fresh(scale.restarts, 0), tasks, checkpoint=checkpoint, **self.options
        )
        best = history.best.argsort(kind="stable")[: scale.replicates]
        arrays = {f"best/{name}": value[best] for name, value in trained.arrays().items()}
        return arrays | _history(history) | {"history/chosen": best}

    def _order(self, replicate: int) -> int:
        return 1000 * self.seed + replicate

    def _networks(
        self, checkpoint: Path, restarts: Mapping, recipes: Mapping[str, Recipe]
    ) -> dict[str, Array]:
        """All networks of some recipes, each replicate begun from one of the best restarts."""
        best = with_prefix(restarts, "best/")
        chosen = (self.high, "supervised-gt")  # the restarts themselves
        jobs = [
            (snr, name, replicate)
            for snr in self.snrs
            for name in recipes
            for replicate in range(self.scale.replicates)
            if (snr, name) != chosen
        ]
        begin = Networks(mlp_widths(self.model), self._mean(), [0] * len(jobs))
        begin.load({k: v[[replicate for *_, replicate in jobs]] for k, v in best.items()})
        tasks = [Task(self.datasets[s], recipes[n], self._order(r)) for s, n, r in jobs]
        trained, history = train_in_parallel(begin, tasks, checkpoint=checkpoint, **self.options)
        arrays, weights = {}, trained.arrays()
        if chosen[1] in recipes:
            arrays |= {f"snr{chosen[0]}/{chosen[1]}/{k}": v for k, v in best.items()}
        for snr, name in dict.fromkeys(job[:2] for job in jobs):
            mine = [k for k, job in enumerate(jobs) if job[:2] == (snr, name)]
            arrays |= {f"snr{snr}/{name}/{k}": v[mine] for k, v in weights.items()}
        names = np.array([f"snr{s}/{n}/{r}" for s, n, r in jobs])
        return arrays | _history(history) | {"history/names": names}

    def _mle(self, snr: int) -> dict[str, Array]:
        """Maximum likelihood on the test grid, from the truth and from the mean tissue."""
        arrays = {}
        mean = self._mean()
        for name, kind in NOISES.items():
            noise = kind(1 / snr)
            found = {start: self._accumulator() for start in ("truth", "mean")}
            voxels = differ = on_bound = lost = 0
            for nodes, theta, signals in self._blocks(snr, f"MLE {name}, SNR {snr}"):
                fits = {
                    "truth": fit_mle(self.model, noise, signals, start=theta),
                    "mean": fit_mle(self.model, noise, signals, start=mean),
                }
                for start, fit in fits.items():
                    found[start].add(nodes, fit.theta)
                voxels += len(signals)
                differ += np.sum(np.abs(fits["truth"].nll - fits["mean"].nll) > 1e-3)
                on_bound += np.sum(fits["truth"].at_bound)
                lost += np.sum(~fits["truth"].converged)
            for start, accumulator in found.items():
                label = name if start == "truth" else f"{name}-from-mean"
                arrays |= _grid_arrays(f"{label}/0", accumulator.statistics())
            arrays[f"share/{name}, ends differ between starts"] = np.array(differ / voxels)
            arrays[f"share/{name}, on a bound"] = np.array(on_bound / voxels)
            arrays[f"share/{name}, not converged"] = np.array(lost / voxels)
        return arrays

    def _test(self, snr: int, networks: Mapping, recipes: Mapping[str, Recipe]) -> dict[str, Array]:
        """The networks of some recipes on the test grid of one SNR."""
        arrays = {}
        trained = self._stored(snr, networks, recipes)
        for label, statistics in self._evaluated(snr, trained).items():
            arrays |= _grid_arrays(label, statistics)
        return {k.removeprefix("grid/"): v for k, v in arrays.items()}

    def _stored(
        self, snr: int, networks: Mapping, recipes: Iterable[str]
    ) -> dict[str, NetworkEstimator]:
        trained = {}
        for name in recipes:
            weights = with_prefix(networks, f"snr{snr}/{name}/")
            for replicate in range(self.scale.replicates):
                network = Networks(mlp_widths(self.model), self._mean(), [0])
                network.load({k: v[[replicate]] for k, v in weights.items()})
                trained[f"{name}/{replicate}"] = self._estimator(network, snr)
        return trained

    # --- parts of stages ---------------------------------------------------------------------

    def _estimator(self, network: Networks, snr: int) -> NetworkEstimator:
        return NetworkEstimator(network, self.model, snr)

    def _accumulator(self) -> GridAccumulator:
        return GridAccumulator(self.grid, self.scale.repeats)

    def _blocks(self, snr: int, what: str) -> Iterator:
        pieces = blocks(self.grid, Rician(1 / snr), self.scale.repeats, self._test_seed(snr))
        with tqdm(total=len(self.grid), unit="node", desc=what) as bar:
            for block in pieces:
                yield block
                bar.update(block.nodes.stop - block.nodes.start)

    def _test_seed(self, snr: int) -> int:
        return int(self._rng(3, snr).integers(2**31))

    def _evaluated(self, snr: int, trained: Mapping) -> dict[str, GridStatistics]:
        found = {label: self._accumulator() for label in trained}
        for nodes, _, signals in self._blocks(snr, f"networks, SNR {snr}"):
            for label, estimator in trained.items():
                found[label].add(nodes, estimator.estimate(signals))
        return {label: accumulator.statistics() for label, accumulator in found.items()}

    def _label_results(self, snr: int) -> dict:
        dataset = self.datasets[snr]
        results = {}
        for name in NOISES:
            label = dataset.labels[name]
            results[name] = {
                "usable": float(label.usable.mean()),
                "on lower, upper bound": {
                    k: list(v) for k, v in label.share_on_bounds(self.model).items()
                },
            }
        return results


class _WholeStudy(_Study):
    """The same, and the paper's further questions."""

    @property
    def settings(self) -> dict:
        return {**vars(self.scale), **super().settings}

    def compute(self, stages: Stages) -> tuple[dict[str, Mapping], dict]:
        tested = self._trained_and_tested(stages)
        restarts, networks, _, statistics = tested
        kept = stages.run("kept", lambda: self._networks(stages.path("kept"), restarts, KEPT))
        for snr in self.snrs:
            found = stages.run(f"kept-snr{snr}", lambda snr=snr: self._test(snr, kept, KEPT))
            statistics[snr] |= found
        inside = {
            snr: stages.run(f"inside-snr{snr}", lambda snr=snr: self._inside(snr, networks | kept))
            for snr in self.snrs
        }
        simulator = stages.run("black-box", lambda: self._black_box(stages.path("black-box")))
        loops = stages.run("straightforward", self._straightforward)
        shapes = {}
        for shape in SHAPES:
            name = f"shape-{shape}"
            found = stages.run(name, lambda s=shape, n=name: self._shape(stages.path(n), s))
            shapes |= {f"{shape}/{k}": v for k, v in found.items()}

        files = self._files(tested)
        files["training.npz"] |= {f"shapes/{k}": v for k, v in shapes.items()}
        # Times differ from run to run: they stand in the manifest, not in a file with a checksum.
        times = with_prefix(simulator, "seconds/")
        files["black-box.npz"] = {
            k: v for k, v in simulator.items() if not k.startswith("seconds/")
        }
        files["inside.npz"] = {
            f"snr{snr}/{k}": v for snr in self.snrs for k, v in inside[snr].items()
        }
        results = self._results(tested)
        results["black-box"] = {
            "rmse of v": {
                str(name): float(simulator[f"rmse/{name}"][:, -1].mean())
                for name in simulator["estimators"]
            },
            "seconds": {name: float(value) for name, value in times.items()},
        }
        results["speed"] = self._speed(stages.seconds, restarts, networks, loops)
        return files, results

    def _shape(self, checkpoint: Path, shape: str) -> dict[str, Array]:
        """Networks of one shape for two recipes, all from scratch."""
        dataset = self.datasets[self.high]
        count = self.scale.wide if shape == "wide" else 2 * self.scale.wide
        names = [name for name in SHAPE_RECIPES for _ in range(count)]
        tasks = [
            Task(dataset, recipe(name), self._order(k % count)) for k, name in enumerate(names)
        ]
        begin = self._fresh(len(tasks), 1 + list(SHAPES).index(shape), **SHAPES[shape])
        options = {**self.options, "epochs": self.scale.shape_epochs}
        trained, history = train_in_parallel(begin, tasks, checkpoint=checkpoint, **options)
        each = {str(k): self._estimator(trained.at([k]), self.high) for k in range(len(trained))}
        loss = [
            np.mean(np.sum((found.rmse / self._mean()) ** 2, axis=1))
            for found in self._evaluated(self.high, each).values()
        ]
        return {
            **with_prefix(_history(history), "history/"),
            "recipe": np.array(names),
            "weights": np.array(sum(w[0].size for w in trained.arrays().values())),
            "test": np.array(loss),
        }

    def _inside(self, snr: int, networks: Mapping) -> dict[str, Array]:
        """Errors over the test signals whose maximum likelihood lies inside the bounds.

        Nodes of the grid with fewer than `FEWEST_INSIDE` such signals are left out.
        """
        noise = Rician(1 / snr)
        trained = self._stored(snr, networks, INSIDE)
        found = {label: self._accumulator() for label in ("mle-rician/0", *trained)}
        for nodes, theta, signals in self._blocks(snr, f"inside the bounds, SNR {snr}"):
            fit = fit_mle(self.model, noise, signals, start=theta)
            found["mle-rician/0"].add(nodes, _masked(fit.theta, fit.at_bound))
            for label, estimator in trained.items():
                found[label].add(nodes, _masked(estimator.estimate(signals), fit.at_bound))
        statistics = {label: accumulator.statistics() for label, accumulator in found.items()}
        teacher = statistics["mle-rician/0"]
        enough = teacher.valid >= FEWEST_INSIDE
        arrays = {"nodes": np.array(enough.sum()), "share": np.array(np.mean(teacher.valid))}
        arrays["share"] = arrays["share"] / self.scale.repeats
        for name in ("mle-rician", *INSIDE):
            replicates = [v for k, v in statistics.items() if k.rsplit("/", 1)[0] == name]
            for metric in ("bias", "sd", "rmse"):
                own = [np.abs(getattr(v, metric))[enough] for v in replicates]
                rival = np.abs(getattr(teacher, metric))[enough]
                arrays[f"{name}/{metric}"] = np.mean(own, axis=1)
                arrays[f"{name}/wins/{metric}"] = np.mean(own < rival, axis=1)
        return arrays

    def _black_box(self, checkpoint: Path) -> dict[str, Array]:
        """Networks for a simulator that has no derivative."""
        scale = self.scale
        return black_box.compare(
            scale.simulated, scale.simulated_epochs, self.seed, checkpoint=checkpoint, progress=True
        )

    def _straightforward(self) -> dict[str, Array]:
        """Seconds a fit and a training step take in the usual loops; our networks' voxels/s."""
        dataset = self.datasets[self.high]
        fits = self.scale.timed_fits
        begin = time.perf_counter()
        with threadpool_limits(1):  # more BLAS threads only get into the way of tiny arrays
            for kind in NOISES.values():
                _scipy_loop(
                    self.model, kind(1 / self.high), dataset.signals[:fits], dataset.theta[:fits]
                )
        fit = (time.perf_counter() - begin) / (2 * fits)
        step = _dataloader_step(dataset, self.scale.batch, self.scale.timed_steps, self.seed)
        estimator = self._estimator(self._fresh(1, 9), self.high)
        signals = np.tile(dataset.signals, (max(1, 1_000_000 // len(dataset.signals)), 1))
        rates = []
        for _ in range(3):
            begin = time.perf_counter()
            estimator.estimate(signals)
            rates.append(len(signals) / (time.perf_counter() - begin))
        return {
            "fit": np.array(fit), "step": np.array(step), "estimate": np.array(max(rates)),
        }  # fmt: skip

    def _speed(
        self, seconds: Mapping, restarts: Mapping, networks: Mapping, loops: Mapping
    ) -> dict:
        """Measured seconds of our way, and of the usual way as extrapolated from a slice."""
        scale, snrs = self.scale, len(self.snrs)
        steps_an_epoch = -(-round(0.8 * scale.voxels) // scale.batch)
        test_fits = 2 * 2 * snrs * len(self.grid) * scale.repeats
        training = {}
        for name, stage in (("restarts", restarts), ("networks", networks)):
            epochs = int(np.isfinite(stage["history/training"]).sum())
            training[name] = {
                "seconds": seconds[name],
                "epochs of all networks": epochs,
                "one after the other": epochs * steps_an_epoch * float(loops["step"]),
            }
        return {
            "labels": {
                "seconds": sum(seconds[f"labels-snr{snr}"] for snr in self.snrs),
                "fits": 2 * snrs * scale.voxels,
                "one after the other": 2 * snrs * scale.voxels * float(loops["fit"]),
            },
            "test": {
                "seconds": sum(seconds[f"mle-snr{snr}"] for snr in self.snrs),
                "fits": test_fits,
                "one after the other": test_fits * float(loops["fit"]),
            },
            **training,
            "network voxels per second": float(loops["estimate"]),
        }


def _masked(estimates: Array, hidden: NDArray[np.bool_]) -> Array:
    return np.where(hidden[:, np.newaxis], np.nan, estimates)


def _history(history: History) -> dict[str, Array]:
    return {
        "history/training": history.training.astype(np.float32),
        "history/validation": history.validation.astype(np.float32),
        "history/best_epoch": history.best_epoch,
        "history/best": history.best,
        "history/diverged": history.diverged,
    }


def _grid_arrays(label: str, statistics: GridStatistics) -> dict[str, Array]:
    return {f"grid/{label}/{k}": v for k, v in statistics.to_arrays().items()}


def _scipy_loop(model: IVIM, noise: Noise, signals: Array, starts: Array) -> None:
    """The usual way to fit: one voxel after the other, derivatives by differences."""
    b = model.bvalues * 1e-3

    def cost(theta, measured):
        s0, f, dslow, dfast = theta
        clean = s0 * (f * np.exp(-b * (dfast + dslow)) + (1 - f) * np.exp(-b * dslow))
        return np.sum(noise.nll(measured, clean))

    for measured, start in zip(signals, starts, strict=True):
        minimize(cost, start, (measured,), method="L-BFGS-B", bounds=model.bounds)


def _dataloader_step(dataset: Dataset, batch: int, steps: int, seed: int) -> float:
    """Seconds of one step of the usual training loop, data loading included."""
    sizes = mlp_widths(dataset.model)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ELU()]
    network = torch.nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(network.parameters())
    weights = torch.tensor(1 / dataset.mean, dtype=torch.float32)
    data = TensorDataset(
        torch.tensor(dataset.signals, dtype=torch.float32),
        torch.tensor(dataset.theta, dtype=torch.float32),
    )
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, batch, shuffle=True, generator=generator)
    done, begin = 0, time.perf_counter()
    for signals, target in loader:
        if done == steps:
            break
        optimiser.zero_grad()
        loss = (weights * (network(signals).abs() - target)).square().sum(dim=1).mean()
        loss.backward()
        optimiser.step()
        done += 1
    return (time.perf_counter() - begin) / done


class Results(StudyResults):
    """What a run has left: statistics of every estimator on the test grid, and more.

    Parameters
    ----------
    protocol : {"paper", "abdomen"}
    location : path, optional
        Folder of the results; by default the one that the book reads.

    Attributes
    ----------
    study : qmri.artefacts.Study
        With ``label`` ("paper scale"), ``settings`` and ``results``.
    model : IVIM
    grid : qmri.evaluation.Grid
    snrs : tuple of int
    replicates : int
        Independent trainings of each network.

    Raises
    ------
    MissingArtefacts
        If the study has not been run; the message names the command.
    """

    def __init__(self, protocol: str = "paper", location: str | Path | None = None):
        super().__init__(study_name("training-labels", protocol, PROTOCOLS), location)
        settings = self.study.settings
        self.model = IVIM(settings["bvalues"])
        self.grid = Grid.regular(self.model, settings["points"])
        self.snrs = tuple(settings["snrs"])
        self.replicates = settings["replicates"]

    def noise(self, snr: int) -> Rician:
        """Noise of the test signals at an SNR."""
        return Rician(1 / snr)

    def names(self, snr: int) -> tuple[str, ...]:
        """Estimators that were tested at an SNR: networks by recipe, and maximum likelihood."""
        labels = self.arrays(self._grid_file(snr))
        return tuple(dict.fromkeys(label.split("/")[0] for label in labels))

    def _grid_file(self, snr: int) -> str:
        check_choice("snr", snr, self.snrs)
        return f"grid-snr{snr}"

    def statistics(self, snr: int, name: str, replicate: int = 0) -> GridStatistics:
        """What one estimator does on the test grid.

        Parameters
        ----------
        snr : int
        name : str
            One of `names`: a recipe, or ``"mle-rician"`` and ``"mle-gaussian"`` (started at
            the truth), and the same with ``-from-mean`` (started at the mean tissue).
        replicate : int
            Of a network, below `replicates`; maximum likelihood has one only.
        """
        found = with_prefix(self.arrays(self._grid_file(snr)), f"{name}/{replicate}/")
        if not found:
            raise ValueError(
                f"name and replicate must be among those tested, {', '.join(self.names(snr))} "
                f"and 0 to {self.replicates - 1}, got {name!r} and {replicate!r}"
            )
        return GridStatistics.from_arrays(self.grid, found)

    def all_statistics(self, snr: int, name: str) -> list[GridStatistics]:
        """`statistics` of every replicate; a list of one for maximum likelihood."""
        count = 1 if name.startswith("mle-") else self.replicates
        return [self.statistics(snr, name, replicate) for replicate in range(count)]

    def inside(self, snr: int) -> dict[str, Array]:
        """Errors over the test signals whose maximum likelihood lies inside the bounds.

        Returns
        -------
        dict of str to array
            ``NAME/bias``, ``NAME/sd``, ``NAME/rmse`` (replicates, parameters): mean over the
            nodes of their magnitudes; ``NAME/wins/...``: share of nodes at which the network's
            is smaller than that of maximum likelihood; ``share``: of such signals; ``nodes``:
            those that have enough of them.
        """
        self._grid_file(snr)  # refuses an SNR that was not studied
        return with_prefix(self.arrays("inside"), f"snr{snr}/")

    def training(self, stage: str) -> dict[str, Array]:
        """How training went.

        Parameters
        ----------
        stage : {"restarts", "networks", "shapes"}

        Returns
        -------
        dict of str to array
            ``training`` and ``validation`` losses (epochs, networks), ``best`` (networks,),
            and for ``"networks"`` the ``names`` ("snr15/self-supervised/0"); for ``"shapes"``
            the same behind ``standard/``, ``wide/`` and ``deep/``, with the number of
            ``weights`` and the ``test`` loss.
        """
        found = with_prefix(self.arrays("training"), f"{stage}/")
        if not found:
            raise ValueError(f"stage must be restarts, networks or shapes, got {stage!r}")
        return found
