"""The study in the abdomen: estimators judged on volunteers, where nobody knows the truth.

``qmri study abdomen --scale quick|paper`` runs it; `Results` reads what it leaves. The data are
those of Wetscherek et al. {cite}`wetscherek2015ivim`, the questions those of Epstein et al.
{cite}`epstein2024labels`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from qmri import pretrained
from qmri._choices import check_choice
from qmri.artefacts import Stages, Study, StudyResults, carry_out, with_prefix
from qmri.crb import cramer_rao_bound
from qmri.datasets import Dataset, labels_from_fit
from qmri.losses import recipe
from qmri.mle import MaximumLikelihood, fit_mle
from qmri.models import IVIM, Array
from qmri.networks import NetworkBank, NetworkEstimator, Networks, mlp_widths
from qmri.noise import Gaussian, Noise, Rician, rician_bias, sigma_from_variances
from qmri.sources import AbdominalScan, DataUnavailable, load_abdomen, load_phantom
from qmri.training import Task, train_in_parallel
from qmri.volumes import Estimator

__all__ = [
    "DESIGNS",
    "EDGES",
    "ESTIMATORS",
    "NETWORKS",
    "ORGANS",
    "PARAMETERS",
    "SCALES",
    "TIMES",
    "Curve",
    "Errors",
    "Measured",
    "Results",
    "Scale",
    "acquisitions",
    "curve",
    "run",
    "typical_sigma",
]

logger = logging.getLogger(__name__)

VOLUNTEERS = (1, 2, 3, 4, 5, 6)
ORGANS = ("liver", "pancreas", "spleen", "kidney")
TIMES = (70.0, 100.0)  # diffusion times, ms
REPEATS = 6  # acquisitions of clinical length at each diffusion time
PARAMETERS = ("f", "Dslow", "Dfast")
MLE: Mapping[str, type[Noise]] = {"mle-rician": Rician, "mle-gaussian": Gaussian}
NETWORKS = (
    "supervised-gt",
    "self-supervised",
    "supervised-mle-rician",
    "supervised-mle-gaussian",
    "hybrid-0.5",
)
ESTIMATORS = (*MLE, *NETWORKS)
# Together: an acquisition is judged by all images of its voxel, its own among them.
# Apart: by the images of the other diffusion time, which share no noise with it.
DESIGNS = ("together", "apart")
# Reference values that share a bin; those of Dfast are wider where it is less certain.
EDGES: Mapping[str, tuple[float, ...]] = {
    "f": tuple(np.round(np.arange(0.0, 0.51, 0.05), 2).tolist()),
    "Dslow": tuple(np.arange(0.0, 3.6, 0.25).tolist()),
    "Dfast": (2, 10, 20, 30, 45, 60, 80, 100, 125, 150, 200, 300),
}
METRICS = ("bias", "sd", "rmse")
# A bin counts as plentiful with so many voxels, of so many volunteers.
PLENTIFUL = {"voxels": 20, "volunteers": 2}
FEWEST_VOXELS = 10  # of a region
PHANTOM_SNR = 20  # of the phantom with noise added
MISTAKES = ("self-supervised", "supervised-mle-rician", "supervised-gt")


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes
    ----------
    copies : int
        Simulated voxels for each one of the volunteers, in each of the two simulations.
    maps : tuple of int
        Volunteers whose whole slice is estimated.
    thinning : int
        Of how many voxels of the phantom one is used.
    seeds, epochs : int
        Trainings of each network on volunteers, and epochs at most.
    """

    copies: int
    maps: tuple[int, ...]
    thinning: int
    seeds: int
    epochs: int


SCALES: Mapping[str, Scale] = {
    "quick": Scale(copies=1, maps=(1,), thinning=20, seeds=1, epochs=100),
    "paper": Scale(copies=5, maps=(1, 4), thinning=4, seeds=5, epochs=500),
}


def run(scale: str, seed: int = 0, out: str | Path | None = None, fresh: bool = False) -> Path:
    """Run the study, or go on with one that was interrupted.

    Parameters
    ----------
    scale : {"quick", "paper"}
    seed : int
        All random numbers follow from it.
    out : path, optional
        Folder for the results; by default the one that the book reads.
    fresh : bool
        Forget what an earlier run has finished.

    Returns
    -------
    pathlib.Path
        Folder with ``manifest.json``, estimates and statistics, and no image of anybody.

    Raises
    ------
    ValueError
        If `scale` is unknown, or the work folder holds another run's stages.
    DataUnavailable
        If no volunteer's data can be had. Volunteers whose data cannot are left out, and the
        manifest says which were there.
    MissingArtefacts
        If the networks for these b-values have not been trained.
    """
    check_choice("scale", scale, SCALES)
    study = _Study(SCALES[scale], seed)
    return carry_out(
        "abdomen", study.compute, study.settings, scale=scale, seed=seed, out=out, fresh=fresh
    )


def acquisitions(scan: AbdominalScan) -> NDArray[np.intp]:
    """Which images make up each acquisition of clinical length: one image for each b-value.

    Parameters
    ----------
    scan : AbdominalScan

    Returns
    -------
    (diffusion times, repeats, b-values) int
        Places among the scan's measurements, b ascending. No image is used twice, and the
        images with b > 0 of one repeat have one gradient direction.
    """
    places = np.empty((len(TIMES), REPEATS, len(np.unique(scan.bvalues))), dtype=np.intp)
    for t, time in enumerate(TIMES):
        for k, b in enumerate(np.unique(scan.bvalues)):
            found = np.flatnonzero((scan.bvalues == b) & (scan.diffusion_times == time))
            places[t, :, k] = found[:REPEATS]
    return places


def typical_sigma(scan: AbdominalScan, region: NDArray[np.bool_]) -> float:
    """Noise of the typical voxel of a region, from its repeated images at b = 0.

    From the variance within each diffusion time (:func:`qmri.noise.sigma_from_variances`). What
    moves in a part of the region does not reach it; what moves everywhere does.

    Parameters
    ----------
    scan : AbdominalScan
    region : (rows, columns) bool

    Returns
    -------
    float
        In the unit of the images.
    """
    variances, freedom = [], 0
    for time in TIMES:
        repeats = scan.at(time).repeats(0)[region]
        variances.append(repeats.var(axis=1, ddof=1))
        freedom += repeats.shape[1] - 1
    return sigma_from_variances(np.mean(variances, axis=0), freedom)


class _Study:
    """The stages of one run; each depends on earlier ones and on the settings alone."""

    def __init__(self, scale: Scale, seed: int):
        self.scale, self.seed = scale, seed
        self.scans = _available()
        first = next(iter(self.scans.values()))
        self.bvalues, self.times = first.bvalues, first.diffusion_times
        self.places = acquisitions(first)
        self.model = IVIM(np.unique(self.bvalues))
        self.networks = _networks()

    @property
    def settings(self) -> dict:
        return {
            **vars(self.scale),
            "maps": list(self._mapped()),
            "volunteers": list(self.scans),
            "networks": self.networks,
            "fewest voxels of a region": FEWEST_VOXELS,
        }

    def _mapped(self) -> tuple[int, ...]:
        return tuple(v for v in self.scale.maps if v in self.scans)

    def compute(self, stages: Stages) -> tuple[dict[str, Mapping], dict]:
        """All stages; returns the files to keep and the numbers for the manifest."""
        files = {"in-vivo.npz": stages.run("in-vivo", self._in_vivo)}
        self.in_vivo = Measured.from_arrays(files["in-vivo.npz"])
        files["consistency.npz"] = stages.run("consistency", self._consistency)
        for number, name in enumerate(("matched", "uniform")):
            files[f"{name}.npz"] = stages.run(
                name, lambda name=name, number=number: self._simulated(name, number)
            )
        files["phantom.npz"] = stages.run("phantom", self._phantom)
        files["mistake.npz"] = stages.run("mistake", lambda: self._mistake(stages.path("mistake")))
        for volunteer in self._mapped():
            found = stages.run(f"maps-{volunteer}", lambda v=volunteer: self._maps(v))
            files[f"maps-{volunteer}.npz"] = found
        usable = self.in_vivo.usable["all"]
        results = {
            "voxels": len(usable),
            "voxels with a reference inside its bounds": int(usable.sum()),
            "volunteers": {str(v): int((self.in_vivo.volunteer == v).sum()) for v in self.scans},
            "not available": [v for v in VOLUNTEERS if v not in self.scans],
            "S0 outside the networks' range (%)": round(
                100 * float(files["in-vivo.npz"]["outside"].mean()), 2
            ),
        }
        return files, results

    # --- measuring ---------------------------------------------------------------------------

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def _estimators(self) -> dict[str, Estimator]:
        """For signals in units of their noise."""
        found = {name: MaximumLikelihood(self.model, kind(1.0)) for name, kind in MLE.items()}
        for name in NETWORKS:
            found[name] = pretrained.load_estimator(
                f"ivim-abdomen/{name}", sigma=1.0, bvalues=self.model.bvalues
            )
        return found

    def _measure(self, signals: Array) -> dict[str, Array]:
        """References and estimates of voxels that were measured as the volunteers were.

        Parameters
        ----------
        signals : (voxels, measurements)
            Of the whole scan, in units of their noise.
        """
        arrays = {}
        for name in ("all", *TIMES):
            chosen = np.ones(len(self.times), bool) if name == "all" else self.times == name
            fit = fit_mle(IVIM(self.bvalues[chosen]), Rician(1.0), signals[:, chosen])
            label = name if name == "all" else f"{name:g}"
            arrays[f"reference/{label}"] = fit.theta.astype(np.float32)
            arrays[f"usable/{label}"] = fit.converged & ~fit.at_bound
        clinical = signals[:, self.places]  # voxels, times, repeats, b-values
        flat = clinical.reshape(-1, self.model.measurements)
        for name, estimator in self._estimators().items():
            estimates = estimator.estimate(flat)[:, self._columns()]
            estimates = estimates.reshape(len(signals), len(TIMES), REPEATS, len(PARAMETERS))
            arrays[f"mean/{name}"] = estimates.mean(axis=2).astype(np.float32)
            arrays[f"sd/{name}"] = estimates.std(axis=2).astype(np.float32)
            if isinstance(estimator, NetworkBank) and "outside" not in arrays:
                arrays["outside"] = estimator.routes(flat).outside.reshape(len(signals), -1)
        return arrays

    def _columns(self) -> list[int]:
        return [self.model.names.index(name) for name in PARAMETERS]

    def _in_vivo(self) -> dict[str, Array]:
        signals, parts = [], []
        for volunteer, scan in self.scans.items():
            for number, organ in enumerate(ORGANS):
                region = scan.regions[organ]
                if region.sum() < FEWEST_VOXELS:
                    continue
                sigma = typical_sigma(scan, region)
                rows, columns = np.nonzero(region)
                count = len(rows)
                signals.append(scan.images[region] / sigma)
                parts.append(
                    {
                        "volunteer": np.full(count, volunteer, np.uint8),
                        "organ": np.full(count, number, np.uint8),
                        "row": rows.astype(np.uint16),
                        "column": columns.astype(np.uint16),
                        "sigma": np.full(count, sigma, np.float32),
                        "snr": (scan.repeats(0)[region].mean(axis=1) / sigma).astype(np.float32),
                    }
                )
        where = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {**where, **self._measure(np.concatenate(signals))}

    def _signals(self, volunteer: int, chosen: NDArray[np.bool_]) -> Array:
        """Of some of the voxels in vivo, all of one volunteer, in units of their noise."""
        found = self.in_vivo
        images = self.scans[volunteer].images[found.row[chosen], found.column[chosen]]
        return images / found.sigma[chosen, np.newaxis]

    def _consistency(self) -> dict[str, Array]:
        """How much more images differ than noise alone would make them.

        Three ratios of variances, 1 where nothing but noise changes: of images of one b-value
        and diffusion time, which differ in direction; of the two diffusion times' means; and of
        the two halves' estimates, against the Cramer-Rao bound.
        """
        found, shape = self.in_vivo, (len(self.scans), len(ORGANS))
        b = self.model.bvalues
        within, between = (np.full((*shape, len(b)), np.nan) for _ in range(2))
        estimates = np.full((*shape, len(PARAMETERS)), np.nan)
        voxels, sigma, pooled = np.zeros(shape, int), *(np.full(shape, np.nan) for _ in range(2))
        for i, volunteer in enumerate(self.scans):
            for j in range(len(ORGANS)):
                chosen = (found.volunteer == volunteer) & (found.organ == j)
                if not chosen.any():
                    continue
                voxels[i, j], sigma[i, j] = chosen.sum(), found.sigma[chosen][0]
                images = self.scans[volunteer].images[found.row[chosen], found.column[chosen]]
                repeats = [images[:, (self.bvalues == 0) & (self.times == t)] for t in TIMES]
                pooled[i, j] = np.sqrt(np.mean([r.var(axis=1, ddof=1) for r in repeats]))
                within[i, j], between[i, j] = self._excess(volunteer, chosen)
                good = chosen & found.usable["all"] & found.usable["70"] & found.usable["100"]
                if good.any():
                    estimates[i, j] = self._excess_of_estimates(good)
        return {
            "volunteers": np.array(list(self.scans)), "bvalues": b, "voxels": voxels,
            "sigma": sigma, "pooled sigma": pooled, "within": within, "between": between,
            "estimates": estimates,
        }  # fmt: skip

    def _excess(self, volunteer: int, chosen: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Variance of images and of the diffusion times' means, over that of noise, by b."""
        signals = self._signals(volunteer, chosen)
        theta = self.in_vivo.reference["all"][chosen].astype(np.float64)
        clean = self.model.signal(theta)
        magnitude = clean + rician_bias(clean, 1.0)
        expected = 2 + clean**2 - magnitude**2  # of a Rician magnitude
        within, between = [], []
        for k, b in enumerate(self.model.bvalues):
            halves = [signals[:, (self.bvalues == b) & (self.times == t)] for t in TIMES]
            noise = expected[:, k].mean()
            within.append(np.mean([h.var(axis=1, ddof=1) for h in halves]) / noise)
            step = halves[0].mean(axis=1) - halves[1].mean(axis=1)
            between.append(np.mean(step**2) / noise / sum(1 / h.shape[1] for h in halves))
        return np.array(within), np.array(between)

    def _excess_of_estimates(self, chosen: NDArray[np.bool_]) -> Array:
        """Squared difference of the halves' estimates over its bound, for the median voxel."""
        reference = {k: v[chosen].astype(np.float64) for k, v in self.in_vivo.reference.items()}
        bound = sum(
            cramer_rao_bound(IVIM(self.bvalues[self.times == t]), Rician(1.0), reference["all"])
            for t in TIMES
        )
        ratio = np.median((reference["70"] - reference["100"]) ** 2 / bound, axis=0)
        # The median of a squared normal variable lies below its mean.
        return ratio[self._columns()] / chi2.ppf(0.5, 1)

    def _simulated(self, name: str, stream: int) -> dict[str, Array]:
        """The volunteers' scan of tissue that is known.

        Matched: tissue, with its S0 / sigma, from the references in vivo. Uniform: from the
        training ranges, with the same distribution of S0 / sigma.
        """
        rng, usable = self._rng(1, stream), self.in_vivo.usable["all"]
        theta = self.in_vivo.reference["all"][usable].astype(np.float64)
        theta = np.tile(theta, (self.scale.copies, 1))
        if name == "uniform":
            snr = theta[:, 0].copy()
            theta = self.model.sample(len(theta), rng)
            theta[:, 0] = snr
        signals = Rician(1.0).sample(IVIM(self.bvalues).signal(theta), rng)
        volunteer = np.tile(self.in_vivo.volunteer[usable], self.scale.copies)
        organ = np.tile(self.in_vivo.organ[usable], self.scale.copies)
        return {
            "volunteer": volunteer, "organ": organ, "truth": theta.astype(np.float32),
            **self._measure(signals),
        }  # fmt: skip

    def _phantom(self) -> dict[str, Array]:
        """The bottle, where f = 0: as it was measured, and with noise added."""
        scan = load_phantom("static")
        region = scan.regions["bottle"]
        sigma = typical_sigma(scan, region)
        images = scan.images[region][:: self.scale.thinning]
        no_flow = {"f": (0.0, 0.0), "Dfast": (10.0, 10.0)}
        single = fit_mle(IVIM(scan.bvalues), Rician(sigma), images, bounds=no_flow)
        s0 = single.theta[:, :1]
        added = s0 / PHANTOM_SNR
        noisy = Rician(added).sample(images, self._rng(2))
        arrays = {
            "snr": (single.theta[:, 0] / sigma).astype(np.float32),
            "D": single.theta[:, 2].astype(np.float32),
        }
        for label, signals in (("measured", images / sigma), ("noise added", noisy / added)):
            found = self._measure(signals)
            arrays |= {f"{label}/{k}": v for k, v in found.items()}
        return arrays

    def _maps(self, volunteer: int) -> dict[str, Array]:
        """The whole slice: a reference, and every estimator on one acquisition."""
        scan = self.scans[volunteer]
        rows, columns = np.nonzero(scan.mask)
        sigma = typical_sigma(scan, scan.mask)
        signals = scan.images[scan.mask] / sigma
        fit = fit_mle(IVIM(self.bvalues), Rician(1.0), signals)
        arrays = {
            "row": rows.astype(np.uint16), "column": columns.astype(np.uint16),
            "shape": np.array(scan.mask.shape), "sigma": np.array(sigma),
            "reference": fit.theta[:, self._columns()].astype(np.float32),
            "usable": fit.converged & ~fit.at_bound,
        }  # fmt: skip
        one = signals[:, self.places[0, 0]]
        for name, estimator in self._estimators().items():
            arrays[name] = estimator.estimate(one)[:, self._columns()].astype(np.float32)
            if isinstance(estimator, NetworkBank):
                arrays["outside"] = estimator.routes(one).outside
        return arrays

    def _mistake(self, checkpoint: Path) -> dict[str, Array]:
        """Networks trained on the very volunteer they are judged on, and on the others.

        All learn from as many signals of the first diffusion time, each divided by its voxel's
        mean at b = 0, and are judged against the reference from all images of the voxel. The
        acquisitions of the second diffusion time are new to all of them.
        """
        per_volunteer = {v: self._clinical(v) for v in self.scans}
        size = min(len(data["signals"][0]) for data in per_volunteer.values())
        tasks, begin, kinds = [], [], list(itertools.product(MISTAKES, self.scans, (True, False)))
        rng = self._rng(3)
        for name, volunteer, own in kinds:
            sources = [v for v in self.scans if (v == volunteer) == own] or list(self.scans)
            pools = [per_volunteer[v] for v in sources]
            for seed in range(self.scale.seeds):
                tasks.append(Task(self._learnt_from(pools, size, rng), recipe(name), seed))
                begin.append(seed)
        scale = tasks[0].dataset.mean
        scale[0] = 1.0
        networks = Networks(mlp_widths(self.model), scale, begin)
        trained, history = train_in_parallel(
            networks, tasks, epochs=self.scale.epochs, patience=self.scale.epochs, batch=64,
            checkpoint=checkpoint, progress=True,
        )  # fmt: skip
        shape = (len(MISTAKES), len(self.scans), 2, self.scale.seeds, len(TIMES), len(PARAMETERS))
        rmse = np.empty((len(kinds) * self.scale.seeds, *shape[-2:]))
        for k in range(len(trained)):
            volunteer = kinds[k // self.scale.seeds][1]
            estimator = NetworkEstimator(trained.at([k]), self.model, snr=5)
            rmse[k] = self._judged(per_volunteer[volunteer], estimator)
        return {
            "recipes": np.array(MISTAKES), "volunteers": np.array(list(self.scans)),
            "signals": np.array(size), "rmse": rmse.reshape(shape),
            "validation": history.best.reshape(shape[:4]),
        }  # fmt: skip

    def _clinical(self, volunteer: int) -> dict[str, Array]:
        """Acquisitions of one volunteer's voxels with a reference, at S0 near 1."""
        chosen = (self.in_vivo.volunteer == volunteer) & self.in_vivo.usable["all"]
        signals = self._signals(volunteer, chosen)
        s0 = signals[:, self.bvalues == 0].mean(axis=1, keepdims=True)
        reference = self.in_vivo.reference["all"][chosen].astype(np.float64)
        reference[:, 0] /= s0[:, 0]
        by_time = (signals / s0)[:, self.places].swapaxes(0, 1)  # times, voxels, repeats, b
        sigma = np.repeat(1 / s0, REPEATS, axis=0)
        flat = by_time.reshape(len(TIMES), -1, self.model.measurements)
        return {
            "signals": flat, "sigma": sigma, "theta": np.repeat(reference, REPEATS, axis=0),
        }  # fmt: skip

    def _learnt_from(self, pools: Sequence[Mapping], size: int, rng: np.random.Generator):
        signals = np.concatenate([pool["signals"][0] for pool in pools])
        theta = np.concatenate([pool["theta"] for pool in pools])
        sigma = np.concatenate([pool["sigma"] for pool in pools])
        chosen = rng.permutation(len(signals))[:size]
        noise = Rician(sigma[chosen])
        labels = labels_from_fit(fit_mle(self.model, noise, signals[chosen]))
        training = np.arange(size) < size - round(0.2 * size)
        return Dataset(
            self.model, noise, theta[chosen], signals[chosen], training, {"mle-rician": labels}
        )

    def _judged(self, data: Mapping, estimator: NetworkEstimator) -> Array:
        """Root mean squared difference to the reference, (diffusion times, parameters)."""
        errors = [
            estimator.estimate(signals)[:, self._columns()] - data["theta"][:, self._columns()]
            for signals in data["signals"]
        ]
        return np.sqrt(np.mean(np.square(errors), axis=1))


def _networks() -> dict[str, str]:
    """Which networks are used: another training gives other results."""
    trained = Study(pretrained.STUDIES["ivim-abdomen"])
    entry = trained.manifest.files[pretrained.FILE]
    return {"scale": trained.scale, "sha256": entry["sha256"]}


def _available() -> dict[int, AbdominalScan]:
    """The volunteers whose data can be had."""
    scans, reason = {}, None
    for volunteer in VOLUNTEERS:
        try:
            scans[volunteer] = load_abdomen(volunteer)
        except DataUnavailable as error:
            logger.info("volunteer %d is left out: %s", volunteer, error)
            reason = error
    if not scans:
        raise reason
    first = next(iter(scans.values()))
    for volunteer, scan in scans.items():
        for name in ("bvalues", "diffusion_times"):
            if not np.array_equal(getattr(scan, name), getattr(first, name)):
                raise ValueError(f"volunteer {volunteer} has {name} in an order of its own")
    return scans


# --- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measured:
    """Voxels that were measured many times, and what each estimator made of them.

    Attributes
    ----------
    volunteer : (voxels,) int
        Whose voxel it is, or whose reference a simulated voxel was drawn with.
    organ : (voxels,) int
        Place in `ORGANS`.
    row, column : (voxels,) int, or None
        Of the image, in vivo.
    sigma : (voxels,), or None
        Noise of the organ, in the unit of the images.
    snr : (voxels,), or None
        Mean at b = 0 over `sigma`.
    truth : (voxels, 4), or None
        Of simulated tissue; S0 in units of the noise.
    reference : mapping of {"all", "70", "100"} to (voxels, 4)
        Rician maximum likelihood on all images, or on those of one diffusion time.
    usable : mapping of the same to (voxels,) bool
        Whether that fit converged inside its bounds.
    mean, sd : mapping of estimator to (voxels, 2, 3)
        Over the six acquisitions of each diffusion time, of each of `PARAMETERS`. The square of
        `sd` is the mean squared deviation.
    outside : (voxels, 12) bool
        Acquisitions whose S0 / sigma lies outside what the networks were trained for.
    """

    volunteer: NDArray
    organ: NDArray
    row: NDArray | None
    column: NDArray | None
    sigma: Array | None
    snr: Array | None
    truth: Array | None
    reference: Mapping[str, Array]
    usable: Mapping[str, NDArray[np.bool_]]
    mean: Mapping[str, Array]
    sd: Mapping[str, Array]
    outside: NDArray[np.bool_]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Measured:
        """From a file of the study."""
        voxels = len(arrays["reference/all"])
        nobody = np.zeros(voxels, np.uint8)
        optional = ("row", "column", "sigma", "snr", "truth")
        grouped = ("reference", "usable", "mean", "sd")
        return cls(
            volunteer=arrays.get("volunteer", nobody),
            organ=arrays.get("organ", nobody),
            outside=arrays["outside"],
            **{name: arrays.get(name) for name in optional},
            **{name: with_prefix(arrays, f"{name}/") for name in grouped},
        )

    def in_organ(self, organ: str) -> NDArray[np.bool_]:
        """Voxels of one organ, (voxels,)."""
        check_choice("organ", organ, ORGANS)
        return self.organ == ORGANS.index(organ)

    def errors(self, estimator: str, design: str, against: str = "reference") -> Errors:
        """Mean error and spread of each voxel.

        Parameters
        ----------
        estimator : str
            One of `ESTIMATORS`; or ``"split-half"``, the reference from the other diffusion
            time as if it were an estimator; or ``"truth"``, of simulated tissue: what an
            estimator without any error would show.
        design : {"together", "apart"}
            Whether the reference comes from all images, or for each diffusion time from those
            of the other one.
        against : {"reference", "truth"}
            What counts as right.
        """
        check_choice("design", design, DESIGNS)
        check_choice("against", against, ("reference", "truth"))
        check_choice("estimator", estimator, (*ESTIMATORS, "split-half", "truth"))
        if "truth" in (estimator, against) and self.truth is None:
            raise ValueError("truth is known of simulated tissue alone")
        if estimator == "split-half":
            # Two halves stand for each other, whatever the design.
            parts = [self._part("100", "70"), self._part("70", "100")]
        elif design == "apart":
            parts = [
                self._pooled(estimator, [test], judge) for test, judge in ((0, "100"), (1, "70"))
            ]
        else:
            parts = [self._pooled(estimator, [0, 1], "all")]
        if against == "truth":
            truth = self.truth[:, 1:].astype(np.float64)
            everywhere = np.ones(len(truth), dtype=bool)
            parts = [part._replace(reference=truth, usable=everywhere) for part in parts]
        return Errors(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def _part(self, estimate: str, judge: str) -> Errors:
        reference = self.reference[judge][:, 1:].astype(np.float64)
        mean = self.reference[estimate][:, 1:].astype(np.float64)
        usable = self.usable[judge] & self.usable[estimate]
        return Errors(reference, mean, np.zeros_like(mean), usable, self._voxels())

    def _pooled(self, estimator: str, tests: list[int], judge: str) -> Errors:
        reference = self.reference[judge][:, 1:].astype(np.float64)
        if estimator == "truth":
            mean = self.truth[:, 1:].astype(np.float64)
            sd = np.zeros_like(mean)
        else:
            means = self.mean[estimator][:, tests].astype(np.float64)
            mean = means.mean(axis=1)
            spread = np.mean(self.sd[estimator][:, tests].astype(np.float64) ** 2, axis=1)
            sd = np.sqrt(spread + means.var(axis=1))
        return Errors(reference, mean, sd, self.usable[judge], self._voxels())

    def _voxels(self) -> NDArray[np.intp]:
        return np.arange(len(self.volunteer))


class Errors(NamedTuple):
    """Estimates of voxels beside what counts as right, (voxels, 3) each.

    A voxel that is judged twice, once by each diffusion time, stands there twice.
    """

    reference: Array
    mean: Array
    sd: Array
    usable: NDArray[np.bool_]
    voxel: NDArray[np.intp]

    @property
    def bias(self) -> Array:
        """Mean estimate minus reference."""
        return self.mean - self.reference

    @property
    def rmse(self) -> Array:
        """Root mean squared difference of single estimates to the reference."""
        return np.hypot(self.bias, self.sd)


@dataclass(frozen=True, eq=False)
class Curve:
    """Errors of one parameter by the value of its reference.

    Attributes
    ----------
    edges : (bins + 1,)
        Of the reference values.
    count : (bins,)
        Voxels; one that is judged twice counts half each time.
    volunteers : (bins,) int
        How many volunteers they come from.
    bias, sd, rmse : (bins,)
        Mean over the voxels of a bin; NaN in an empty one.
    spread : mapping of metric to (2, bins)
        5th and 95th percentile over volunteers drawn with replacement.
    """

    edges: Array
    count: Array
    volunteers: NDArray[np.intp]
    bias: Array
    sd: Array
    rmse: Array
    spread: Mapping[str, Array]

    @property
    def centres(self) -> Array:
        """Middle of each bin."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    @property
    def plentiful(self) -> NDArray[np.bool_]:
        """Bins with as many voxels and volunteers as `PLENTIFUL` asks for."""
        enough = self.count >= PLENTIFUL["voxels"]
        return enough & (self.volunteers >= PLENTIFUL["volunteers"])

    def average(self, metric: str, bins: NDArray[np.bool_]) -> float:
        """Mean magnitude of a metric over some bins, each counted by its voxels."""
        values = np.abs(getattr(self, metric)[bins])
        return float(np.average(values, weights=self.count[bins]))

    def distance(self, other: Curve, metric: str, bins: NDArray[np.bool_]) -> float:
        """Root mean square distance to another curve over some bins, counted by own voxels."""
        gap = getattr(self, metric)[bins] - getattr(other, metric)[bins]
        return float(np.sqrt(np.average(gap**2, weights=self.count[bins])))


def curve(
    measured: Measured,
    estimator: str,
    parameter: str,
    design: str = "together",
    *,
    against: str = "reference",
    organ: str | None = None,
) -> Curve:
    """Bias, SD and RMSE against the reference value, as in the paper's figure 5.

    Parameters
    ----------
    measured : Measured
    estimator, design, against
        As for :meth:`Measured.errors`.
    parameter : {"f", "Dslow", "Dfast"}
    organ : str, optional
        One of `ORGANS`; all of them by default.

    Returns
    -------
    Curve

    References
    ----------
    Epstein et al. {cite}`epstein2024labels`.
    """
    check_choice("parameter", parameter, PARAMETERS)
    column, edges = PARAMETERS.index(parameter), np.array(EDGES[parameter], dtype=np.float64)
    found = measured.errors(estimator, design, against)
    value = found.reference[:, column]
    chosen = found.usable & np.isfinite(found.mean[:, column])
    chosen &= (value >= edges[0]) & (value <= edges[-1])
    if organ is not None:
        chosen &= measured.in_organ(organ)[found.voxel]
    place = np.clip(np.searchsorted(edges, value[chosen], side="right") - 1, 0, len(edges) - 2)
    owners = measured.volunteer[found.voxel[chosen]]
    people = np.unique(measured.volunteer)
    cells = np.searchsorted(people, owners) * (len(edges) - 1) + place
    weight = len(measured.volunteer) / len(found.voxel)

    def per_person(values: Array) -> Array:
        total = np.bincount(cells, values, minlength=len(people) * (len(edges) - 1))
        return weight * total.reshape(len(people), -1)

    count = per_person(np.ones(len(cells)))
    sums = {m: per_person(getattr(found, m)[chosen, column]) for m in METRICS}
    draws = _draws(len(people))
    with np.errstate(invalid="ignore"):
        means = {m: total.sum(axis=0) / count.sum(axis=0) for m, total in sums.items()}
        drawn = {m: (draws @ total) / (draws @ count) for m, total in sums.items()}
    spread = {m: _percentiles(values) for m, values in drawn.items()}
    return Curve(edges, count.sum(axis=0), (count > 0).sum(axis=0), spread=spread, **means)


def _draws(people: int) -> Array:
    """How often each of some people is drawn, with replacement; every possible draw if few."""
    if people <= 4:
        drawn = np.array(list(itertools.product(range(people), repeat=people)))
    else:
        drawn = np.random.default_rng(0).integers(people, size=(1000, people))
    return np.array([np.bincount(d, minlength=people) for d in drawn], dtype=np.float64)


def _percentiles(values: Array) -> Array:
    """5th and 95th over the draws that hold anything, (2, bins)."""
    result = np.full((2, values.shape[1]), np.nan)
    some = np.isfinite(values).any(axis=0)
    result[:, some] = np.nanpercentile(values[:, some], (5, 95), axis=0)
    return result


class Results(StudyResults):
    """What a run has left: references, what each estimator made of them, and controls.

    Parameters
    ----------
    location : path, optional
        Folder of the results; by default the one that the book reads.

    Attributes
    ----------
    study : qmri.artefacts.Study
        With ``label`` ("paper scale"), ``settings`` and ``results``.
    volunteers : tuple of int
        Whose data there were.

    Raises
    ------
    MissingArtefacts
        If the study has not been run; the message names the command.
    """

    def __init__(self, location: str | Path | None = None):
        super().__init__("abdomen", location)
        self.volunteers = tuple(self.study.settings["volunteers"])

    def measured(self, name: str) -> Measured:
        """Voxels and estimates.

        Parameters
        ----------
        name : {"in-vivo", "matched", "uniform"}
            Volunteers; simulated tissue drawn from their references; simulated tissue drawn
            from the networks' training ranges.
        """
        check_choice("name", name, ("in-vivo", "matched", "uniform"))
        return Measured.from_arrays(self.arrays(name))

    def phantom(self, state: str) -> Measured:
        """The bottle, as it was ``"measured"`` or with ``"noise added"``."""
        check_choice("state", state, ("measured", "noise added"))
        return Measured.from_arrays(with_prefix(self.arrays("phantom"), f"{state}/"))

    def maps(self, volunteer: int) -> dict[str, Array]:
        """Parameter maps of a whole slice.

        Parameters
        ----------
        volunteer : int
            One of those in ``study.settings["maps"]``.

        Returns
        -------
        dict of str to (rows, columns, 3)
            ``reference``, from all images, and each of `ESTIMATORS` from one acquisition, of
            each of `PARAMETERS`; NaN outside the body. ``usable`` (rows, columns): whether the
            reference lies inside its bounds; ``outside``: whether S0 / sigma lies outside what
            the networks were trained for.
        """
        check_choice("volunteer", volunteer, self.study.settings["maps"])
        found = self.arrays(f"maps-{volunteer}")
        rows, columns, shape = found["row"], found["column"], tuple(found["shape"])
        maps = {}
        for name in ("reference", *ESTIMATORS):
            maps[name] = np.full((*shape, len(PARAMETERS)), np.nan)
            maps[name][rows, columns] = found[name]
        for name in ("usable", "outside"):
            maps[name] = np.zeros(shape, dtype=bool)
            maps[name][rows, columns] = found[name]
        return maps

    def mistake(self) -> dict[str, Array]:
        """Networks trained on the volunteer they are judged on, and on the others.

        Returns
        -------
        dict of str to array
            ``rmse`` against the reference (recipes, volunteers, 2, seeds, diffusion times,
            parameters): on the third axis the volunteer's own network, then one of the others;
            the signals of the first diffusion time are those it learnt from, or like them.
            ``recipes``, ``volunteers``; ``signals``, how many each network learnt from.
        """
        return self.arrays("mistake")
