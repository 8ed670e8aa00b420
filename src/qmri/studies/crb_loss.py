"""The study of the CRB loss: networks for magnetization-transfer fingerprints, trained and tested.

``qmri study crb-loss --scale quick|paper`` runs it; `Results` reads what it leaves.
Zhang et al. {cite}`zhang2022crb`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from qmri import pretrained
from qmri._choices import check_choice
from qmri.artefacts import Stages, StudyResults, carry_out, study_name, with_prefix
from qmri.crb import bound_from_jacobian, bound_with_complex_parameters, with_amplitude
from qmri.datasets import Fingerprints
from qmri.evaluation import RepeatStatistics, repeat_statistics
from qmri.losses import fingerprint_loss
from qmri.models import Array
from qmri.mt import MTModel, PulseTrain
from qmri.mt.basis import basis_from_gram, conjugation, energy_outside, fingerprint, gram_matrix
from qmri.mt.dictionary import Dictionary
from qmri.mt.nlls import fit_nlls
from qmri.mt.posterior import bayes_floor
from qmri.networks import (
    FingerprintEstimator,
    FingerprintNetwork,
    compact_fingerprint_network,
    paper_fingerprint_network,
)
from qmri.noise import ComplexGaussian
from qmri.sources import load_mt_basis
from qmri.training import (
    FingerprintHistory,
    FingerprintTask,
    train_fingerprints_in_parallel,
)

__all__ = ["NETWORKS", "PROTOCOLS", "SCALES", "TARGETS", "VARIANTS", "Results", "Scale", "run"]


TARGETS = ("m0s", "T1", "T2f")
RANK = 13
SIGMA = 0.01  # of each real channel
MAGNITUDE = (0.1, 1.0)  # of M0
PROTOCOLS = ("published", "default")

# SNRmax is |M0| / sigma. The papers' bias and spread are those at 50; training covers 10 to 100.
SNR = 50.0
SNRS = (3.0, 5.0, 10.0, 20.0, 30.0, 50.0, 70.0, 100.0, 200.0, 500.0)
# What does not vary on a plane of two parameters: the centres of the distributions.
CENTRE = {
    "m0s": 0.12, "T1": 1.6, "T2f": 0.1, "Rx": 44.0, "T2s": 12e-6, "B0": 0.0, "B1": 1.0,
}  # fmt: skip
PLANES = {
    "T1-T2f": {"T1": (0.4, 3.2), "T2f": (0.02, 0.4)},
    "m0s-T1": {"m0s": (0.02, 0.3), "T1": (0.4, 3.2)},
}


@dataclass(frozen=True)
class Plan:
    """A network of the study.

    Attributes
    ----------
    loss : str
        One of `qmri.losses.FINGERPRINT_LOSSES`.
    shape : {"compact", "paper"}
        The paper's network is trained by the paper's recipe.
    replicates : bool
        Whether it is trained several times.
    """

    loss: str
    shape: str = "compact"
    replicates: bool = False


NETWORKS: Mapping[str, Plan] = {
    "crb": Plan("crb", replicates=True),
    "mse": Plan("mse", replicates=True),
    "relative": Plan("relative"),
    "crb-m0s": Plan("crb-m0s"),
    "crb-t1": Plan("crb-t1"),
    "crb-t2f": Plan("crb-t2f"),
    "paper-crb": Plan("crb", shape="paper"),
    "paper-mse": Plan("mse", shape="paper"),
}
STORED = ("crb", "mse")  # their weights are kept


@dataclass(frozen=True)
class Variant:
    """A change of the compact network or of its training, all else equal."""

    network: Mapping = field(default_factory=dict)
    training: Mapping = field(default_factory=dict)
    mirror: bool = True
    standardised: bool = True
    width: int = 256
    shape: str = "compact"


# How the compact network learns. Matrix products are rounded but for the last tenth of epochs.
RECIPE = {
    "batch": 256, "learning_rate": 2e-3, "schedule": "cosine", "clip": 1.0, "single_precision": 0.1,
}  # fmt: skip
# The paper's own: a rate of 0.01, halved every tenth of the epochs, batches of 512. Products are
# rounded over its first nine tenths, which takes two thirds of the time.
PAPER_RECIPE = {"batch": 512, "learning_rate": 0.01, "schedule": "step", "single_precision": 0.1}
VARIANTS: Mapping[str, Variant] = {
    "compact": Variant(),
    "without rotation": Variant(network={"rotate": False}),
    "without logarithms": Variant(network={"log_outputs": False}),
    "without mirror images": Variant(mirror=False),
    "without standardised inputs": Variant(standardised=False),
    "without clipping": Variant(training={"clip": None}),
    "half the rate": Variant(training={"learning_rate": RECIPE["learning_rate"] / 2}),
    "twice the rate": Variant(training={"learning_rate": 2 * RECIPE["learning_rate"]}),
    "rate halved in steps": Variant(training={"schedule": "step"}),
    "batches of 128": Variant(training={"batch": 128}),
    "batches of 512": Variant(training={"batch": 512}),
    "128 wide": Variant(width=128),
    "384 wide": Variant(width=384),
    "the paper's network and recipe": Variant(
        training=PAPER_RECIPE, mirror=False, standardised=False, shape="paper"
    ),
}


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes
    ----------
    training, validation, test : int
        Fingerprints.
    epochs, variant_epochs, paper_epochs : int
        Of the compact networks, of their variants, and of the paper's network.
    replicates : int
        Trainings of the networks that are compared, from different first weights.
    repeats : int
        Noisy signals of each test fingerprint.
    swept, swept_repeats : int
        Test fingerprints whose SNR is varied, and noisy signals of each.
    points : int
        Along each side of a plane.
    floor, floor_steps : int
        Fingerprints whose posterior is computed, and steps of each chain.
    fitted : int
        Test fingerprints that are also fitted by least squares.
    """

    training: int
    validation: int
    test: int
    epochs: int
    variant_epochs: int
    paper_epochs: int
    replicates: int
    repeats: int
    swept: int
    swept_repeats: int
    points: int
    floor: int
    floor_steps: int
    fitted: int


SCALES: Mapping[str, Scale] = {
    "quick": Scale(
        training=8192,
        validation=1024,
        test=1024,
        epochs=12,
        variant_epochs=3,
        paper_epochs=5,
        replicates=2,
        repeats=30,
        swept=128,
        swept_repeats=30,
        points=8,
        floor=16,
        floor_steps=150,
        fitted=16,
    ),
    "paper": Scale(
        training=92_160,
        validation=10_240,
        test=9_056,
        epochs=100,
        variant_epochs=20,
        paper_epochs=400,
        replicates=3,
        repeats=300,
        swept=1024,
        swept_repeats=100,
        points=20,
        floor=512,
        floor_steps=1500,
        fitted=128,
    ),
}


def run(
    scale: str,
    protocol: str = "published",
    seed: int = 0,
    out: str | Path | None = None,
    fresh: bool = False,
) -> Path:
    """Run the study, or go on with one that was interrupted.

    Parameters
    ----------
    scale : {"quick", "paper"}
    protocol : {"published", "default"}
        The published train and basis, which are fetched, or the train that the library holds
        and a basis made for it.
    seed : int
        All random numbers follow from it.
    out : path, optional
        Folder for the results; by default the one that the book reads.
    fresh : bool
        Forget what an earlier run has finished.

    Returns
    -------
    pathlib.Path
        Folder with ``manifest.json``, two networks, and the statistics of all.

    Raises
    ------
    ValueError
        If `scale` or `protocol` is unknown, or the work folder holds another run's stages.
    DataUnavailable, CorruptFile
        If the published train cannot be had.
    """
    check_choice("scale", scale, SCALES)
    name = study_name("crb-loss", protocol, PROTOCOLS)
    study = _Study(SCALES[scale], protocol, seed)
    return carry_out(
        name, study.compute, study.settings, scale=scale, seed=seed, protocol=protocol, out=out,
        fresh=fresh,
    )  # fmt: skip


class _Study:
    """The stages of one run; each depends on earlier ones and on the settings alone."""

    def __init__(self, scale: Scale, protocol: str, seed: int):
        self.scale, self.protocol, self.seed = scale, protocol, seed
        published = protocol == "published"
        self.train = PulseTrain.published() if published else PulseTrain.default()
        self.noise = ComplexGaussian(SIGMA)

    @property
    def settings(self) -> dict:
        return {
            **vars(self.scale),
            "train": self.train.fingerprint,
            "rank": RANK,
            "sigma": SIGMA,
            "magnitude": list(MAGNITUDE),
            "snr": SNR,
            "snrs": list(SNRS),
            "networks": {name: asdict(plan) for name, plan in NETWORKS.items()},
            "variants": {name: asdict(variant) for name, variant in VARIANTS.items()},
            "recipe": RECIPE,
            "paper_recipe": PAPER_RECIPE,
            "planes": {name: {k: list(v) for k, v in p.items()} for name, p in PLANES.items()},
            "centre": CENTRE,
        }

    def compute(self, stages: Stages) -> tuple[dict[str, Mapping], dict]:
        """All stages; returns the files to keep and the numbers for the manifest."""
        subspace = stages.run("subspace", self._subspace)
        self.basis = subspace["basis"]
        self.model = MTModel(self.train, self.basis)
        self.sets = {
            part: _fingerprints(stages.run(f"{part}-set", lambda p=part: self._simulated(p)))
            for part in ("validation", "test", "training")
        }
        physics = stages.run("physics", self._physics)
        groups = {
            "networks": dict(self._jobs("compact")),
            "variants": dict(self._variants()),
            "paper-networks": dict(self._jobs("paper")),
        }
        trained, histories = {}, {}

        def train_all(stage: str) -> None:
            tasks = groups[stage]
            found = stages.run(stage, lambda: self._trained(stages.path(stage), tasks))
            for label, task in tasks.items():
                histories[label] = with_prefix(found, f"{label}|history/")
                if stage != "variants":
                    # Tested as they are stored: in half precision, in half the space.
                    weights = with_prefix(found, f"{label}|network/")
                    rounded = {k: v.astype(np.float16) for k, v in weights.items()}
                    trained[label] = task.network.copy().load(rounded)

        train_all("networks")
        floor = stages.run("floor", self._floor)
        conventional = stages.run("conventional", lambda: self._conventional(trained))
        train_all("variants")
        train_all("paper-networks")
        test, sweep, planes = {}, {}, {}
        for label, network in trained.items():
            safe = label.replace("/", "-")
            tested = stages.run(f"test-{safe}", lambda n=network: self._test(n))
            test |= {f"{label}/{k}": v for k, v in tested.items()}
            swept = stages.run(f"sweep-{safe}", lambda n=network: self._sweep(n))
            sweep |= {f"{label}/{k}": v for k, v in swept.items()}
            on_planes = stages.run(f"planes-{safe}", lambda n=network: self._on_planes(n))
            planes |= {f"{label}/{k}": v for k, v in on_planes.items()}
        planes |= stages.run("planes", self._plane_tissue)

        tissue = self.sets["test"]
        weights = {}
        for name in STORED:
            for key, value in trained[f"{name}/0"].arrays().items():
                weights[f"{name}/{key}"] = value.astype(np.float16)
        # Times differ from run to run: they stand in the manifest, not in files with a checksum.
        files = {
            pretrained.FILE: {**weights, "basis": self.basis.astype(np.complex64)},
            "fingerprints.npz": {
                "coefficients": tissue.coefficients.astype(np.complex64),
                "theta": tissue.theta.astype(np.float32),
                "crb": tissue.crb.astype(np.float32),
            },
            "training.npz": {
                f"{label}/{k}": v
                for label, history in histories.items()
                for k, v in history.items()
                if k != "seconds"
            },
            "test.npz": {k: v.astype(np.float32) for k, v in test.items()},
            "sweep.npz": {k: v.astype(np.float32) for k, v in sweep.items()},
            "planes.npz": {k: v.astype(np.float32) for k, v in planes.items()},
            "floor.npz": floor,
            "conventional.npz": {
                k: v for k, v in conventional.items() if not k.startswith("seconds/")
            },
            "physics.npz": {**physics, **{k: v for k, v in subspace.items() if k != "basis"}},
        }
        results = {
            "floor": {
                "loss": float(floor["floor"].mean()),
                "standard error": float(
                    floor["floor"].mean(axis=1).std(ddof=1) / math.sqrt(len(floor["floor"]))
                ),
            },
            "validation CRB loss": {
                label: float(history["validation/crb"][-1].mean())
                for label, history in histories.items()
            },
            "seconds of training": {
                label: float(history["seconds"]) for label, history in histories.items()
            },
            "seconds per fingerprint": {
                k.removeprefix("seconds/"): float(v)
                for k, v in conventional.items()
                if k.startswith("seconds/")
            },
            "networks": {
                name: {
                    "settings": trained[f"{name}/0"].settings,
                    "basis": fingerprint(self.basis),
                }
                for name in STORED
            },
        }
        return files, results

    # --- data --------------------------------------------------------------------------------

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def _tissue(self, part: str) -> Array:
        parts = ("training", "validation", "test")
        number = parts.index(part)
        return MTModel(self.train).sample(getattr(self.scale, part), self._rng(0, number))

    def _subspace(self) -> dict[str, Array]:
        """The basis, and how much of the signals lies outside it."""
        plain, tissue = MTModel(self.train), self._tissue("training")
        held_out = self._tissue("test")[:1024]
        pieces = tqdm(_pieces(tissue), unit="piece", desc="singular values")
        gram = gram_matrix(plain.signal(tissue[piece]) for piece in pieces)
        # B0 of either sign is as likely, so that the signals' conjugates belong to the set, too.
        gram = gram.real
        own, singular = basis_from_gram(gram, RANK)
        basis = load_mt_basis(RANK)[0] if self.protocol == "published" else own
        signals = plain.signal(held_out)
        shifted = held_out.copy()
        period = 2 * np.pi / self.train.repetition_time
        shifted[:, 5] -= np.sign(shifted[:, 5]) * period
        # Half a period before and after the echo turn the signal by half a turn.
        change = np.linalg.norm(plain.signal(shifted) + signals, axis=1)
        larger, _ = basis_from_gram(gram, 40)
        ranks = np.arange(1, 41)
        return {
            "basis": basis,
            "singular values": singular[:100],
            "energy outside": energy_outside(signals, basis),
            "energy outside own basis": energy_outside(signals, own),
            "energy outside by rank": np.array(
                [np.quantile(energy_outside(signals, larger[:, :r]), (0.5, 0.9)) for r in ranks]
            ),
            "change after a period": change / np.linalg.norm(signals, axis=1),
        }

    def _simulated(self, part: str) -> dict[str, Array]:
        """Coefficients, tissue and bounds at M0 = 1."""
        theta = self._tissue(part)
        coefficients = np.empty((len(theta), RANK), dtype=np.complex128)
        crb = np.empty((len(theta), len(TARGETS)))
        for piece in tqdm(_pieces(theta), unit="piece", desc=f"{part} set"):
            signal, jacobian = self.model.signal_and_jacobian(theta[piece])
            coefficients[piece] = signal
            crb[piece] = bound_from_jacobian(with_amplitude(signal, jacobian), SIGMA)[:, :3]
        return {"coefficients": coefficients, "theta": theta, "crb": crb}

    def _physics(self) -> dict[str, Array]:
        """What is special about the bounds."""
        test = self.sets["test"]
        count = min(2048, len(test))
        signal, jacobian = self.model.signal_and_jacobian(test.theta[:count])
        plain = bound_from_jacobian(with_amplitude(signal, jacobian), SIGMA)
        one = np.concatenate([jacobian, signal[:, :, np.newaxis]], axis=2)
        ratio = np.sqrt(bound_with_complex_parameters(one, SIGMA)[:, :3] / plain[:, :3])
        width = self.model.prior_sd(test.theta)[:, :3]
        shares = []
        for size in (1.0, 0.5, 0.1):
            wide = np.sqrt(test.crb) / size > width
            shares.append([wide.any(axis=1).mean(), wide.all(axis=1).mean(), *wide.mean(axis=0)])
        quantiles = np.linspace(0, 1, 101)
        return {
            "complex over real": ratio,
            "magnitudes": np.array([1.0, 0.5, 0.1]),
            "share wider than prior": np.array(shares),
            "bound quantiles": np.quantile(np.sqrt(test.crb), quantiles, axis=0),
            "infinite": np.isinf(self.sets["training"].crb).mean(axis=0),
            "mirror loss": np.array(self._mirror_loss()),
        }

    def _mirror_loss(self) -> float:
        """How far the conjugate of a signal leaves the basis: mean share of energy."""
        coefficients = self.sets["test"].coefficients[:1024]
        mirrored = coefficients.conj() @ conjugation(self.basis).T
        lost = 1 - np.sum(np.abs(mirrored) ** 2, axis=1) / np.sum(np.abs(coefficients) ** 2, axis=1)
        return float(lost.mean())

    # --- training ----------------------------------------------------------------------------

    def _jobs(self, shape: str) -> Iterator[tuple[str, FingerprintTask]]:
        """The networks of one shape, by label, replicate after replicate."""
        paper = shape == "paper"
        variant = VARIANTS["the paper's network and recipe" if paper else "compact"]
        epochs = self.scale.paper_epochs if paper else self.scale.epochs
        for replicate in range(self.scale.replicates):
            for name, plan in NETWORKS.items():
                if plan.shape == shape and (plan.replicates or replicate == 0):
                    yield f"{name}/{replicate}", self._task(variant, plan.loss, replicate, epochs)

    def _variants(self) -> Iterator[tuple[str, FingerprintTask]]:
        for name, variant in VARIANTS.items():
            yield f"variant/{name}", self._task(variant, "crb", 0, self.scale.variant_epochs)

    def _task(self, variant: Variant, loss: str, replicate: int, epochs: int) -> FingerprintTask:
        first = int(self._rng(1, replicate).integers(2**31))
        if variant.shape == "paper":
            network = paper_fingerprint_network(RANK, seed=first)
            options = variant.training
        else:
            network = compact_fingerprint_network(RANK, width=variant.width, seed=first)
            network = FingerprintNetwork(**{**network.settings, **variant.network}, seed=first)
            options = {**RECIPE, **variant.training}
        if variant.standardised:
            network = network.standardised(self._typical())
        if variant.mirror:
            options = {**options, "conjugation": conjugation(self.basis)}
        seed = 1000 * self.seed + replicate
        options = {
            "epochs": epochs, "seed": seed, "sigma": SIGMA, "magnitude": MAGNITUDE, **options,
        }  # fmt: skip
        return FingerprintTask(network, fingerprint_loss(loss), options)

    def _typical(self) -> Array:
        """Noisy fingerprints as a network meets them in training."""
        part = self.sets["training"][:10_000]
        return part.noisy(self._rng(6), SIGMA, MAGNITUDE, conjugation(self.basis)).coefficients

    def _trained(self, checkpoint: Path, tasks: Mapping[str, FingerprintTask]) -> dict[str, Array]:
        found = train_fingerprints_in_parallel(
            tasks, self.sets["training"], self.sets["validation"], checkpoint=checkpoint,
            progress=True,
        )  # fmt: skip
        arrays = {}
        for label, (network, history) in found.items():
            arrays |= {f"{label}|network/{k}": v for k, v in network.arrays().items()}
            arrays |= {f"{label}|history/{k}": v for k, v in _history(history).items()}
            weights = sum(value.size for value in network.arrays().values())
            arrays[f"{label}|history/weights"] = np.array(weights)
        return arrays

    # --- tests -------------------------------------------------------------------------------

    def _estimator(self, network: FingerprintNetwork) -> FingerprintEstimator:
        return FingerprintEstimator(network, fingerprint(self.basis))

    def _scaled(self, coefficients: ArrayLike, snr: float) -> Array:
        """Fingerprints of one SNRmax, each with a phase of its own that is always the same."""
        phase = self._rng(2).uniform(0, 2 * np.pi, len(self.sets["test"]))[: len(coefficients)]
        return snr * SIGMA * np.exp(1j * phase)[:, np.newaxis] * coefficients

    def _repeated(
        self, network: FingerprintNetwork, coefficients: ArrayLike, snr: float, repeats: int
    ) -> RepeatStatistics:
        clean = self._scaled(coefficients, snr)
        return repeat_statistics(self._estimator(network), clean, self.noise, repeats, self.seed)

    def _test(self, network: FingerprintNetwork) -> dict[str, Array]:
        found = self._repeated(network, self.sets["test"].coefficients, SNR, self.scale.repeats)
        return {"mean": found.mean, "sd": found.sd}

    def _sweep(self, network: FingerprintNetwork) -> dict[str, Array]:
        """Squared bias and variance over the bound, (SNRs, fingerprints, targets)."""
        part = self.sets["test"][: self.scale.swept]
        parts = {"bias": [], "variance": []}
        for snr in SNRS:
            found = self._repeated(network, part.coefficients, snr, self.scale.swept_repeats)
            crb = part.crb / (snr * SIGMA) ** 2
            parts["bias"].append((found.mean - part.targets) ** 2 / crb)
            parts["variance"].append(found.sd**2 / crb)
        return {k: np.array(v).astype(np.float32) for k, v in parts.items()}

    def _plane_tissue(self) -> dict[str, Array]:
        arrays = {}
        for name, plane in PLANES.items():
            theta = _plane(self.model, plane, self.scale.points)
            signal, jacobian = self.model.signal_and_jacobian(theta)
            arrays[f"{name}/theta"] = theta
            crb = bound_from_jacobian(with_amplitude(signal, jacobian), SIGMA)
            arrays[f"{name}/crb"] = crb[:, :3] / (SNR * SIGMA) ** 2
        return arrays

    def _on_planes(self, network: FingerprintNetwork) -> dict[str, Array]:
        arrays = {}
        for name, plane in PLANES.items():
            signal = self.model.signal(_plane(self.model, plane, self.scale.points))
            found = repeat_statistics(
                self._estimator(network), SNR * SIGMA * signal, self.noise, self.scale.repeats,
                self.seed,
            )  # fmt: skip
            arrays |= {f"{name}/mean": found.mean, f"{name}/sd": found.sd}
        return arrays

    def _floor(self) -> dict[str, Array]:
        part = self.sets["test"][: self.scale.floor].noisy(self._rng(3), SIGMA, MAGNITUDE)
        found = bayes_floor(
            self.model, part.coefficients, part.theta, part.m0, sigma=SIGMA, magnitude=MAGNITUDE,
            steps=self.scale.floor_steps, rng=self._rng(4), progress=True,
        )  # fmt: skip
        return {**vars(found), "m0": np.abs(part.m0)}

    def _conventional(self, trained: Mapping[str, FingerprintNetwork]) -> dict[str, Array]:
        """Dictionary matching and least squares beside a network, on the same noisy signals."""
        part = self.sets["test"][: self.scale.fitted]
        rng = self._rng(5)
        clean = self._scaled(part.coefficients, SNR)
        noisy = self.noise.sample(clean, rng)
        crb = part.crb / (SNR * SIGMA) ** 2
        dictionary = Dictionary(self.model, self.sets["training"].theta)
        arrays, seconds = {}, {}

        def add(name: str, estimate: Callable[[], Array]) -> None:
            begin = time.perf_counter()
            found = estimate()[:, : len(TARGETS)]
            seconds[name] = (time.perf_counter() - begin) / len(found)
            arrays[f"estimate/{name}"] = found

        network = self._estimator(trained["crb/0"])
        network.estimate(noisy)
        add("network", lambda: network.estimate(noisy))
        add("dictionary", lambda: dictionary.estimate(noisy))
        arrays["dictionary without noise"] = dictionary.estimate(clean)[:, : len(TARGETS)]
        fits = {}

        def fit(name: str, **options: object) -> Array:
            fits[name] = fit_nlls(self.model, noisy, progress=True, **options)
            return fits[name].theta

        centre = np.array([CENTRE[name] for name in self.model.names])
        add("nlls", lambda: fit("nlls"))
        add("nlls from the centre", lambda: fit("nlls from the centre", start=centre))
        add("nlls from the truth", lambda: fit("nlls from the truth", start=part.theta))
        best = np.min([f.cost for f in fits.values()], axis=0)
        for name, found in fits.items():
            # In units of the noise: above 1, the difference is not one of rounding.
            arrays[f"excess/{name}"] = (found.cost - best) / SIGMA**2
            arrays[f"at bound/{name}"] = found.at_bound.any(axis=1)
            arrays[f"converged/{name}"] = found.converged
        arrays |= {"truth": part.targets, "crb": crb}
        arrays |= {f"seconds/{k}": np.array(v) for k, v in seconds.items()}
        return arrays


_PIECE = 1024


def _pieces(theta: Array) -> list[slice]:
    return [slice(first, first + _PIECE) for first in range(0, len(theta), _PIECE)]


def _fingerprints(arrays: Mapping) -> Fingerprints:
    return Fingerprints(arrays["coefficients"], arrays["theta"], arrays["crb"], sigma=SIGMA)


def _history(history: FingerprintHistory) -> dict[str, Array]:
    validation = {f"validation/{k}": v for k, v in history.validation.items()}
    return {
        "training": history.training, **validation, "learning_rate": history.learning_rate,
        "seconds": np.array(history.seconds),
    }  # fmt: skip


def _plane(model: MTModel, plane: Mapping[str, tuple[float, float]], points: int) -> Array:
    """Tissue on a plane, the first parameter along the rows, (points^2, 7)."""
    axes = [np.linspace(low, high, points) for low, high in plane.values()]
    mesh = np.meshgrid(*axes, indexing="ij")
    theta = np.tile([CENTRE[name] for name in model.names], (points**2, 1))
    for name, values in zip(plane, mesh, strict=True):
        theta[:, model.names.index(name)] = values.ravel()
    return theta


class Results(StudyResults):
    """What a run has left: statistics of every network, the Bayes floor, and more.

    Parameters
    ----------
    protocol : {"published", "default"}
    location : path, optional
        Folder of the results; by default the one that the book reads.

    Attributes
    ----------
    study : qmri.artefacts.Study
    replicates : int
        Trainings of the networks that are compared.
    snrs : tuple of float
        SNRmax of the sweep.

    Raises
    ------
    MissingArtefacts
        If the study has not been run; the message names the command.
    """

    def __init__(self, protocol: str = "published", location: str | Path | None = None):
        super().__init__(study_name("crb-loss", protocol, PROTOCOLS), location)
        self.replicates = self.study.settings["replicates"]
        self.snrs = tuple(self.study.settings["snrs"])

    def names(self) -> tuple[str, ...]:
        """Networks that were trained and tested, as in `NETWORKS`."""
        return tuple(self.study.settings["networks"])

    def replicates_of(self, name: str) -> range:
        """Trainings of one network."""
        check_choice("name", name, self.names())
        return range(self.replicates if self.study.settings["networks"][name]["replicates"] else 1)

    def fingerprints(self) -> Fingerprints:
        """The test set: coefficients, tissue and bounds at M0 = 1."""
        found = self.arrays("fingerprints")
        sigma = self.study.settings["sigma"]
        return Fingerprints(found["coefficients"], found["theta"], found["crb"], sigma=sigma)

    def history(self, name: str, replicate: int = 0) -> dict[str, Array]:
        """Training and validation losses by epoch; ``validation/crb`` is (epochs, targets)."""
        return self._of("training", name, replicate)

    def variant(self, name: str) -> dict[str, Array]:
        """As `history`, of one of `VARIANTS`, with the number of ``weights``."""
        variants = self.study.settings["variants"]
        check_choice("name", name, variants)
        return with_prefix(self.arrays("training"), f"variant/{name}/")

    def test(self, name: str, replicate: int = 0) -> dict[str, Array]:
        """Over repeats of each test fingerprint at the settings' SNRmax.

        Returns
        -------
        dict of str to (n, targets)
            ``mean``, ``sd``, the ``bias``, and the ``crb`` at that SNR.
        """
        found, part = self._of("test", name, replicate), self.fingerprints()
        scale = self.study.settings["snr"] * self.study.settings["sigma"]
        return {**found, "bias": found["mean"] - part.targets, "crb": part.crb / scale**2}

    def sweep(self, name: str, replicate: int = 0) -> dict[str, Array]:
        """``bias`` (squared) and ``variance`` over the bound, (snrs, fingerprints, targets)."""
        return self._of("sweep", name, replicate)

    def plane(self, plane: str, name: str, replicate: int = 0) -> dict[str, Array]:
        """On a plane of two parameters, (points, points, targets).

        Returns
        -------
        dict of str to array
            ``mean``, ``sd``, ``bias``, ``crb``, and ``theta`` (points, points, 7).
        """
        check_choice("plane", plane, self.study.settings["planes"])
        own = with_prefix(self._of("planes", name, replicate), f"{plane}/")
        found = {**own, **with_prefix(self.arrays("planes"), f"{plane}/")}
        points = self.study.settings["points"]
        shaped = {k: v.reshape(points, points, -1) for k, v in found.items()}
        return {**shaped, "bias": shaped["mean"] - shaped["theta"][..., : len(TARGETS)]}

    def _of(self, file: str, name: str, replicate: int) -> dict[str, Array]:
        if replicate not in self.replicates_of(name):
            raise ValueError(
                f"replicate must be from 0 to {len(self.replicates_of(name)) - 1}, got {replicate}"
            )
        return with_prefix(self.arrays(file), f"{name}/{replicate}/")
