"""The study of a brain slice: networks for fingerprints judged by least squares, in vivo.

``qmri study brain --scale quick|paper`` runs it; `Results` reads what it leaves.
The slice, and what is claimed of it, are those of Zhang et al. {cite}`zhang2022crb`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from matplotlib.path import Path as Outline
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from tqdm import tqdm

from qmri import pretrained
from qmri._choices import check_choice
from qmri.artefacts import Stages, Study, StudyResults, carry_out, with_prefix
from qmri.crb import bound_from_jacobian, with_amplitude
from qmri.models import Array
from qmri.mt import MTModel, PulseTrain
from qmri.mt.nlls import NLLSFit, fit_nlls
from qmri.networks import FingerprintEstimator
from qmri.noise import ComplexGaussian
from qmri.sources import load_mt_basis, load_mt_slice
from qmri.studies.crb_loss import MAGNITUDE, SIGMA, TARGETS

__all__ = [
    "BOUNDS",
    "DEEP",
    "NETWORKS",
    "NOISES",
    "SCALES",
    "TUBES",
    "ImageFit",
    "Results",
    "Scale",
    "best_neighbour",
    "fit_image",
    "freedom",
    "inside",
    "local_noise",
    "neighbours",
    "phantom",
    "run",
    "suspicious",
    "white_matter",
]

NETWORKS = ("crb", "mse")
RANK = 13

# T2s is hardly identified: left free, it ends on a bound in most voxels. And where hardly any
# magnetization is exchanged, a large pool without exchange is the same as no pool at all: with Rx
# away from 0 there is only the latter. The signal repeats with B0, but for what happens during
# the pulses: a second minimum lies one period away, and a shimmed brain is within half of one.
T2S = 12e-6  # s
HALF_PERIOD = np.pi / 3.5e-3  # rad/s
BOUNDS: Mapping[str, tuple[float, float]] = {
    "T2s": (T2S, T2S), "Rx": (5.0, 150.0), "B0": (-HALF_PERIOD, HALF_PERIOD),
}  # fmt: skip

# In units of the noise variance of the voxel, by which a sum of squares is lower or the same.
IMPROVED = 0.01
SAME = 0.1
SUSPICIOUS = 1.5  # times the median residual of the neighbours
ROUNDS = 4  # of restarts from neighbours, at most
ITERATIONS = 100  # of a descent, at most

# Tissue, as least squares sees it: s. Above lies fluid, pure or in part.
TISSUE = {"T1": 3.0, "T2f": 0.15}
WHITE = {"m0s": 0.14, "T1": 1.8}  # at least, at most (s)
RING = 4  # voxels around a deep structure that it is compared with
LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # between voxels whose residuals are compared
WINDOW = 7  # rows and columns of voxels over which the noise is averaged
# How much of the residual is noise: all of it, or what differs from voxel to voxel.
NOISES = ("residual", "local")
DEEP = ("lentiform nucleus", "caudate nucleus", "thalamus")
# Outlines in rows and columns of the whole slice, whose left side is the forehead: drawn on the
# maps by least squares alone, borders by m0s and T1, by somebody who had seen no network's map.
# The slice lies too high to tell the pallidum from the putamen.
OUTLINES: Mapping[str, tuple[tuple[float, float], ...]] = {
    "lentiform nucleus upper": (
        (57.5, 88.5), (57.5, 93.5), (56.5, 96.5), (56.5, 101.5), (57.0, 104.5), (59.5, 104.5),
        (60.5, 100.5), (61.5, 98.5), (61.5, 94.5), (60.5, 89.5),
    ),
    "lentiform nucleus lower": (
        (107.0, 82.5), (105.5, 86.5), (103.5, 89.5), (103.5, 93.5), (105.5, 97.5), (108.0, 99.5),
        (110.5, 103.5), (112.5, 103.5), (112.5, 96.5), (110.5, 87.5),
    ),
    "caudate nucleus upper": (
        (66.0, 75.5), (65.5, 80.5), (67.0, 85.5), (69.0, 88.5), (71.0, 90.5), (73.5, 90.5),
        (73.5, 84.5), (71.5, 81.5), (68.5, 78.0),
    ),
    "caudate nucleus lower": (
        (98.5, 72.5), (95.5, 74.0), (93.5, 77.5), (91.5, 82.5), (92.5, 87.5), (93.5, 89.0),
        (95.5, 86.5), (97.0, 83.5), (99.0, 79.5), (99.5, 74.0),
    ),
    "thalamus upper": (
        (74.5, 101.0), (72.0, 103.0), (69.5, 105.5), (67.5, 111.5), (65.5, 118.0), (65.5, 124.5),
        (71.5, 125.5), (74.5, 119.5), (79.5, 111.5), (80.0, 104.5),
    ),
    "thalamus lower": (
        (91.0, 100.0), (88.0, 102.5), (88.0, 107.5), (92.0, 115.5), (96.0, 121.5), (97.5, 125.0),
        (101.5, 125.0), (99.0, 114.5), (96.5, 108.5), (94.5, 100.0),
    ),
}  # fmt: skip

# The phantom: tubes with more or less of a semi-solid pool, without and with a dopant that
# shortens T1 and T2f. Values are of the order of those of cross-linked albumin.
TUBES: Mapping[str, Mapping[str, float]] = {
    "10 %": {"m0s": 0.06, "T1": 2.6, "T2f": 0.11},
    "15 %": {"m0s": 0.10, "T1": 2.4, "T2f": 0.085},
    "20 %": {"m0s": 0.14, "T1": 2.2, "T2f": 0.07},
    "10 %, doped": {"m0s": 0.06, "T1": 1.2, "T2f": 0.075},
    "15 %, doped": {"m0s": 0.10, "T1": 1.1, "T2f": 0.06},
    "20 %, doped": {"m0s": 0.14, "T1": 1.0, "T2f": 0.05},
}
# Lengths in mm; B0 in rad/s: the difference from the axis to the rim; B1 on the axis and, but
# for a slope, at the rim.
PHANTOM = {
    "radius": 90.0, "distance": 55.0, "tube radius": 14.0, "Rx": 40.0, "B0": 2 * np.pi * 60,
    "B1": [1.15, 0.8], "snr": 50.0,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes
    ----------
    step : int
        Every how manieth row and column of the slice is looked at.
    erosion : int
        Rows of voxels taken off the white matter, at that step.
    block : int
        Voxels fitted between two checkpoints.
    noises : int
        Noisy fingerprints simulated at the estimate of each voxel, for either strength of noise.
    refitted : int
        Voxels of tissue that are fitted again: simulated fingerprints, and the measured one
        with T2s left free.
    tube : int
        Voxels of each tube of the phantom.
    """

    step: int
    erosion: int
    block: int
    noises: int
    refitted: int
    tube: int


SCALES: Mapping[str, Scale] = {
    "quick": Scale(step=4, erosion=0, block=1024, noises=4, refitted=60, tube=12),
    "paper": Scale(step=1, erosion=2, block=1024, noises=16, refitted=1000, tube=120),
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
        Folder with ``manifest.json``, parameter maps, and tables.

    Raises
    ------
    ValueError
        If `scale` is unknown, or the work folder holds another run's stages.
    DataUnavailable, CorruptFile
        If the slice, its basis or its pulse train cannot be had.
    MissingArtefacts
        If no networks for fingerprints are stored; the message names the command.

    Notes
    -----
    The fits do not depend on the networks: after these have been trained anew, the same command
    reads the fits that are finished and repeats the rest.
    """
    check_choice("scale", scale, SCALES)
    study = _Study(SCALES[scale], seed)
    return carry_out(
        "brain", study.compute, study.settings, scale=scale, seed=seed, out=out, fresh=fresh
    )


# --- least squares over an image -------------------------------------------------------------


@dataclass
class ImageFit:
    """Least squares in every voxel of an image, from several starts.

    Attributes
    ----------
    theta : (voxels, 7)
    m0 : (voxels,) complex
    cost : (voxels,)
        As `qmri.mt.nlls.NLLSFit` has them.
    converged : (voxels,) bool
    at_bound : (voxels, 7) bool
    iterations : (voxels,)
        Signals simulated with derivatives.
    ends : (passes, voxels)
        Sum of squares at which each pass ended; NaN where a voxel was left out.
    """

    theta: Array
    m0: NDArray[np.complex128]
    cost: Array
    converged: NDArray[np.bool_]
    at_bound: NDArray[np.bool_]
    iterations: NDArray[np.int64]
    ends: Array

    @classmethod
    def first(cls, fit: NLLSFit) -> ImageFit:
        """What the first pass over all voxels has found."""
        return cls(**vars(fit), ends=fit.cost[np.newaxis].copy())

    @property
    def variance(self) -> Array:
        """Noise variance of each real channel as the residual has it, (voxels,)."""
        return self.cost / freedom(self.at_bound)

    @property
    def passes(self) -> NDArray[np.int64]:
        """How often each voxel was fitted, (voxels,)."""
        return np.sum(np.isfinite(self.ends), axis=0)

    @property
    def agreeing(self) -> NDArray[np.int64]:
        """How many of these ended at the lowest sum of squares, (voxels,)."""
        with np.errstate(invalid="ignore"):
            return np.sum(self.ends < self.cost + SAME * self.variance, axis=0)

    def update(self, voxels: NDArray[np.intp], fit: NLLSFit) -> NDArray[np.intp]:
        """Take over what a pass over some voxels has found, where it is better.

        Returns
        -------
        (improved,)
            The voxels that have a new tissue.
        """
        ends = np.full(len(self.cost), np.nan)
        ends[voxels] = fit.cost
        self.ends = np.concatenate([self.ends, ends[np.newaxis]])
        self.iterations[voxels] += fit.iterations
        lower = fit.cost < self.cost[voxels]
        improved = voxels[fit.cost < self.cost[voxels] - IMPROVED * self.variance[voxels]]
        for name in ("theta", "m0", "cost", "converged", "at_bound"):
            getattr(self, name)[voxels[lower]] = getattr(fit, name)[lower]
        return improved


def freedom(at_bound: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Degrees of freedom of the residual, (voxels,): channels less what was fitted."""
    fixed = sum(low == high for low, high in BOUNDS.values())
    return 2 * RANK - (2 + at_bound.shape[1] - fixed - at_bound.sum(axis=1))


def neighbours(mask: ArrayLike) -> NDArray[np.intp]:
    """The eight voxels around each voxel of a mask.

    Parameters
    ----------
    mask : (rows, columns) bool

    Returns
    -------
    (voxels, 8)
        Places among the voxels of the mask, row by row; -1 outside of it.
    """
    mask = np.pad(np.asarray(mask, dtype=bool), 1)
    place = np.full(mask.shape, -1, dtype=np.intp)
    place[mask] = np.arange(mask.sum())
    row, column = np.nonzero(mask)
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    return np.stack([place[row + i, column + j] for i, j in around], axis=1)


def suspicious(fit: ImageFit, around: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Voxels whose fit deserves more starts, (voxels,).

    Those that have not converged, that ended on a bound, or whose residual is high compared
    with the residuals around.
    """
    noise = np.sqrt(fit.variance)
    beside = np.where(around >= 0, noise[around], np.nan)
    beside[np.all(around < 0, axis=1), 0] = np.inf
    high = noise > SUSPICIOUS * np.nanmedian(beside, axis=1)
    return ~fit.converged | fit.at_bound.any(axis=1) | high


def best_neighbour(
    coefficients: NDArray, signal: NDArray, around: NDArray[np.intp]
) -> NDArray[np.intp]:
    """The neighbour whose tissue explains each voxel best.

    Parameters
    ----------
    coefficients : (voxels, rank)
        Measured fingerprints.
    signal : (voxels, rank)
        Fingerprint of the tissue that was found in each voxel.
    around : (voxels, 8)
        From `neighbours`.

    Returns
    -------
    (voxels,)
        -1 for a voxel without neighbours.
    """
    shape = signal / np.linalg.norm(signal, axis=1)[:, np.newaxis]
    explained = np.abs(np.einsum("vkm,vm->vk", shape[around].conj(), coefficients))
    explained = np.where(around >= 0, explained, -1.0)
    best = np.argmax(explained, axis=1)
    return around[np.arange(len(around)), best]


def fit_image(
    model: MTModel,
    coefficients: NDArray,
    mask: NDArray[np.bool_],
    stages: Stages,
    block: int,
) -> ImageFit:
    """Least squares in each voxel of an image, from several starts; it can be interrupted.

    Parameters
    ----------
    model : MTModel
    coefficients : (voxels, rank) complex
        Measured fingerprints of the voxels of `mask`, row by row.
    mask : (rows, columns) bool
    stages : Stages
        Where the blocks that are finished are kept.
    block : int
        Voxels fitted between two checkpoints.

    Returns
    -------
    ImageFit

    Notes
    -----
    A first pass descends from the best match in a dictionary. Voxels that look suspicious then
    get three descents from distinct matches. Last, every voxel is fitted again from the tissue of
    the neighbour that explains it best, and again for as long as a neighbour has changed: what
    one voxel has found spreads.
    """

    def fitted(name: str, voxels: NDArray[np.intp], **options: object) -> NLLSFit:
        begin = options.pop("start", None)
        found = []
        for k, first in enumerate(range(0, len(voxels), block)):
            part = slice(first, first + block)
            own = {} if begin is None else {"start": begin[part]}
            found.append(
                stages.run(
                    f"{name}-{k}",
                    lambda part=part, own=own: vars(
                        fit_nlls(
                            model, coefficients[voxels[part]], bounds=BOUNDS,
                            max_iterations=ITERATIONS, progress=True,
                            **options, **own,
                        )
                    ),
                )
            )  # fmt: skip
        return NLLSFit(**{k: np.concatenate([f[k] for f in found]) for k in found[0]})

    everyone = np.arange(len(coefficients))
    around = neighbours(mask)
    fit = ImageFit.first(fitted("first", everyone, starts=1))
    doubtful = np.flatnonzero(suspicious(fit, around))
    if len(doubtful):
        fit.update(doubtful, fitted("doubtful", doubtful, starts=3))
    signal, stale, todo = np.empty_like(coefficients), everyone, everyone
    for turn in range(ROUNDS):
        signal[stale] = model.signal(fit.theta[stale])
        other = best_neighbour(coefficients, signal, around)
        todo = todo[other[todo] >= 0]
        if len(todo) == 0:
            break
        begin = fit.theta[other[todo]]
        stale = fit.update(todo, fitted(f"neighbours-{turn}", todo, start=begin))
        changed = np.isin(around, stale).any(axis=1)
        todo = np.flatnonzero(changed)
    return fit


# --- regions ---------------------------------------------------------------------------------


def white_matter(theta: Array, mask: NDArray[np.bool_], erosion: int) -> NDArray[np.bool_]:
    """White matter by its large semi-solid pool and short T1, smoothed and eroded, (voxels,).

    Parameters
    ----------
    theta : (voxels, 7)
    mask : (rows, columns) bool
        Where the voxels lie.
    erosion : int
        Rows of voxels taken off.
    """
    m0s, t1 = theta[:, 0], theta[:, 1]
    image = np.zeros(mask.shape, dtype=bool)
    image[mask] = (m0s > WHITE["m0s"]) & (t1 < WHITE["T1"])
    image = ndimage.median_filter(image, size=3)
    if erosion:
        image = ndimage.binary_erosion(image, iterations=erosion)
    return image[mask]


def local_noise(residual: NDArray, freedom: ArrayLike, mask: NDArray[np.bool_]) -> Array:
    """Noise of each real channel from what residuals do not share with those beside them.

    Parameters
    ----------
    residual : (voxels, channels) complex
        What the fit has left, each voxel turned to the same phase.
    freedom : (voxels,)
        Degrees of freedom of the residual of each voxel.
    mask : (rows, columns) bool
        Where the voxels lie.

    Returns
    -------
    (voxels,)
        In the unit of `residual`; the median of all where too few voxels lie around.

    Notes
    -----
    Second differences along rows and columns, which cancel what changes linearly, averaged over
    a small window. White noise of variance s2 gives each of them a mean square of
    6 s2 (degrees of freedom). Noise that neighbours share is missed.
    """
    image = np.full((*mask.shape, residual.shape[1]), np.nan, dtype=complex)
    image[mask] = residual / np.sqrt(np.asarray(freedom, dtype=float))[:, np.newaxis]
    total, number = np.zeros(mask.shape), np.zeros(mask.shape)
    for axis in (0, 1):
        turned = np.moveaxis(image, axis, 0)
        second = turned[:-2] - 2 * turned[1:-1] + turned[2:]
        power = np.sum(np.abs(second) ** 2, axis=2) / 6
        there = np.isfinite(power)
        for sums, values in ((total, np.where(there, power, 0)), (number, there.astype(float))):
            np.moveaxis(sums, axis, 0)[1:-1] += values
    total, number = (ndimage.uniform_filter(x, WINDOW, mode="constant") for x in (total, number))
    total, number = total[mask], number[mask]
    enough = number > 4.5 / WINDOW**2  # five differences, whatever the rounding
    noise = np.sqrt(total[enough] / number[enough])
    found = np.full(len(residual), np.median(noise) if enough.any() else np.nan)
    found[enough] = noise
    return found


def inside(corners: Sequence[tuple[float, float]], places: ArrayLike) -> NDArray[np.bool_]:
    """Whether places lie within a polygon, (voxels,).

    Parameters
    ----------
    corners : sequence of (row, column)
    places : (voxels, 2)
        Rows and columns.
    """
    return Outline(np.asarray(corners, dtype=float)).contains_points(np.asarray(places))


# --- the study -------------------------------------------------------------------------------


class _Study:
    """The stages of one run; each depends on earlier ones and on the settings alone."""

    def __init__(self, scale: Scale, seed: int):
        self.scale, self.seed = scale, seed
        self.train = PulseTrain.published()
        self.plain = MTModel(self.train)

    @property
    def settings(self) -> dict:
        return {
            **vars(self.scale),
            "train": self.train.fingerprint,
            "rank": RANK,
            "bounds": {name: list(limits) for name, limits in BOUNDS.items()},
            "tolerances": [IMPROVED, SAME, SUSPICIOUS, ROUNDS, ITERATIONS],
            "tissue": TISSUE,
            "white matter": WHITE,
            "deep grey matter": {k: [list(c) for c in v] for k, v in OUTLINES.items()},
            "ring": RING,
            "lags": list(LAGS),
            "window": WINDOW,
            "tubes": {name: dict(tube) for name, tube in TUBES.items()},
            "phantom": PHANTOM,
            "parameters": list(self.plain.names),
            "ranges": self.plain.training.tolist(),
            "trained snr": [m / SIGMA for m in MAGNITUDE],
        }

    def compute(self, stages: Stages) -> tuple[dict[str, Mapping], dict]:
        """All stages; returns the files to keep and the numbers for the manifest."""
        basis = load_mt_basis(RANK)[0]
        networks = {name: pretrained.load_estimator(f"mt/{name}", basis=basis) for name in NETWORKS}
        self.model = MTModel(self.train, basis)
        of_networks = {"scale": Study("crb-loss").scale}
        scan, step = load_mt_slice(), self.scale.step
        self.mask = scan.mask[::step, ::step]
        self.coefficients = scan.coefficients[::step, ::step][self.mask]
        self.places = step * np.argwhere(self.mask)

        fit = fit_image(self.model, self.coefficients, self.mask, stages, self.scale.block)
        seconds = sum(stages.seconds.values())
        precision = self._in_blocks(stages, "precision", fit)
        regions = self._regions(fit)
        left = self._left(fit, precision["signal"])
        free = freedom(fit.at_bound)
        self.noise = {
            "residual": np.sqrt(fit.variance), "local": local_noise(left, free, self.mask),
        }  # fmt: skip
        refits = stages.run("refits", lambda: self._refits(fit, precision["signal"], regions))
        tubes = stages.run("phantom", self._phantom)
        results = {
            "voxels": len(self.places),
            "seconds of NLLS": seconds,
            "signals": int(fit.iterations.sum()),
            "networks": of_networks,
            "seconds of networks": {},
        }
        estimates, of_refits, of_tubes = {}, {}, {}
        for name, network in networks.items():
            # Stages of a network that is trained anew are computed anew.
            weights = _digest(network)
            found = stages.run(
                f"network-{name}-{weights}",
                lambda n=network: self._network(n, fit, precision["signal"], refits, tubes),
            )
            results["networks"][name] = weights
            results["seconds of networks"][name] = float(found["seconds"])
            estimates |= {f"{name}/{k}": v for k, v in with_prefix(found, "slice/").items()}
            of_refits |= {f"{name}/{k}": v for k, v in with_prefix(found, "refits/").items()}
            of_tubes[f"estimate/{name}"] = found["phantom"]

        single = {"places", "converged", "at bound", "passes", "agreeing"}
        maps = {
            "shape": np.array(scan.mask.shape),
            "places": self.places.astype(np.int16),
            "theta": fit.theta,
            "m0": np.abs(fit.m0),
            "sigma": self.noise["residual"],
            "noise": self.noise["local"],
            "sd": precision["sd"],
            "shift by T2s": precision["shift"],
            "converged": fit.converged,
            "at bound": fit.at_bound,
            "passes": fit.passes.astype(np.uint8),
            "agreeing": fit.agreeing.astype(np.uint8),
            **{f"region/{name}": region for name, region in regions.items()},
        }
        files = {
            "slice.npz": {
                k: v if k in single or v.dtype.kind in "bi" else v.astype(np.float32)
                for k, v in maps.items()
            },
            "networks.npz": {k: v.astype(np.float32) for k, v in estimates.items()},
            "residual.npz": self._residual(left / self.noise["residual"][:, np.newaxis], regions),
            "refits.npz": {
                "voxels": refits["voxels"].astype(np.int32),
                **{
                    k: v.astype(np.float32)
                    for k, v in {**refits, **of_refits}.items()
                    if "/" in k and not k.startswith("noisy/")
                },
            },
            "phantom.npz": {
                "tube": tubes["tube"].astype(np.uint8),
                "converged": tubes["converged"],
                "at bound": tubes["at bound"],
                **{k: tubes[k].astype(np.float32) for k in ("places", "truth", "theta", "sd")},
                **{k: v.astype(np.float32) for k, v in of_tubes.items()},
            },
        }
        return files, results

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    # --- the slice ---------------------------------------------------------------------------

    def _in_blocks(self, stages: Stages, name: str, fit: ImageFit) -> dict[str, Array]:
        """`_precision` of all voxels, block by block."""
        found = []
        sigma = np.sqrt(fit.variance) / np.abs(fit.m0)
        for k, first in enumerate(range(0, len(sigma), self.scale.block)):
            part = slice(first, first + self.scale.block)
            found.append(
                stages.run(f"{name}-{k}", lambda p=part: self._precision(fit.theta[p], sigma[p]))
            )
        return {key: np.concatenate([f[key] for f in found]) for key in found[0]}

    def _precision(self, theta: Array, sigma: Array) -> dict[str, Array]:
        """Fingerprints, the roots of their bounds, and what another T2s would change.

        `sigma` is that of signals with M0 = 1. T2s is known, as it is in the fit.
        """
        signal, jacobian = self.model.signal_and_jacobian(theta)
        t2s = self.model.names.index("T2s")
        others = [p for p in range(theta.shape[1]) if p != t2s]
        full = with_amplitude(signal, np.delete(jacobian, t2s, axis=2))
        sd = np.zeros(theta.shape)
        sd[:, others] = np.sqrt(bound_from_jacobian(full, sigma[:, np.newaxis])[:, : len(others)])
        real = np.concatenate([full.real, full.imag], axis=1)
        scale = np.linalg.norm(real, axis=1)
        scale[scale == 0] = 1.0
        change = np.concatenate([jacobian[..., t2s].real, jacobian[..., t2s].imag], axis=1)
        inverse = np.linalg.pinv(real / scale[:, np.newaxis], rcond=1e-6)
        shift = -np.einsum("vpm,vm->vp", inverse, change) / scale
        return {"signal": signal, "sd": sd, "shift": 1e-6 * shift[:, : len(TARGETS)]}

    def _regions(self, fit: ImageFit) -> dict[str, NDArray[np.bool_]]:
        """White matter, deep structures, what surrounds these, and all tissue."""
        t1, t2f = fit.theta[:, 1], fit.theta[:, 2]
        usable = fit.converged & ~fit.at_bound.any(axis=1)
        tissue = usable & (t1 < TISSUE["T1"]) & (t2f < TISSUE["T2f"])
        regions = {"tissue": tissue}
        white = white_matter(fit.theta, self.mask, self.scale.erosion) & tissue
        deep = {
            name: np.any([inside(corners, self.places) for corners in sides], axis=0) & tissue
            for name, sides in _sides().items()
        }
        anywhere = np.any(list(deep.values()), axis=0)
        regions["white matter"] = white & ~anywhere
        for name, region in deep.items():
            image = np.zeros(self.mask.shape, dtype=bool)
            image[self.mask] = region
            wide = ndimage.binary_dilation(image, iterations=max(1, RING // self.scale.step))
            regions[name] = region
            regions[f"around {name}"] = wide[self.mask] & ~anywhere & tissue
        return regions

    def _left(self, fit: ImageFit, signal: NDArray) -> NDArray:
        """What the fits have left, turned to the phase of M0."""
        left = self.coefficients - fit.m0[:, np.newaxis] * signal
        return left * np.exp(-1j * np.angle(fit.m0))[:, np.newaxis]

    def _residual(self, left: NDArray, regions: Mapping[str, NDArray]) -> dict[str, Array]:
        """What the residuals of a region have in common, in units of the noise."""
        found = {}
        for name in ("white matter", *DEEP):
            part = left[regions[name]]
            if len(part) > 1:
                found[f"mean/{name}"] = part.mean(axis=0).astype(np.complex64)
                # Of the mean square, without what chance alone gives a mean.
                power = np.sum(np.abs(part) ** 2, axis=1).mean()
                common = np.sum(np.abs(part.mean(axis=0)) ** 2)
                share = (common - power / len(part)) / (power - power / len(part))
                found[f"common/{name}"] = np.array(share)
        image = np.zeros((*self.mask.shape, RANK), dtype=complex)
        image[self.mask] = left
        tissue = np.zeros(self.mask.shape, dtype=bool)
        tissue[self.mask] = regions["tissue"]
        found["lags"] = self.scale.step * np.array(LAGS)
        found["correlation"] = np.array(
            [[_lagged(image, tissue, lag, axis) for lag in LAGS] for axis in (0, 1)]
        )
        return found

    def _refits(
        self, fit: ImageFit, signal: NDArray, regions: Mapping[str, NDArray]
    ) -> dict[str, Array]:
        """Some voxels again: fingerprints simulated at the estimates, and T2s left free."""
        rng = self._rng(0)
        tissue = np.flatnonzero(regions["tissue"])
        voxels = np.sort(rng.permutation(tissue)[: self.scale.refitted])
        found = {"voxels": voxels}

        def again(coefficients: NDArray, bounds: Mapping) -> NLLSFit:
            return fit_nlls(
                self.model, coefficients, start=fit.theta[voxels], bounds=bounds,
                max_iterations=ITERATIONS, progress=True,
            )  # fmt: skip

        for level in NOISES:
            noisy = self._noisy(fit, signal, voxels, level, rng)
            found |= {f"noisy/{level}": noisy, f"theta/{level}": again(noisy, BOUNDS).theta}
        freed = {name: limits for name, limits in BOUNDS.items() if name != "T2s"}
        other = again(self.coefficients[voxels], freed)
        found |= {"free/theta": other.theta, "free/cost": other.cost / fit.cost[voxels]}
        return found

    def _noisy(
        self,
        fit: ImageFit,
        signal: NDArray,
        voxels: NDArray,
        level: str,
        rng: np.random.Generator,
    ) -> NDArray:
        clean = fit.m0[voxels, np.newaxis] * signal[voxels]
        # White noise of each voxel's own strength.
        unit = ComplexGaussian(1.0).sample(np.zeros_like(clean), rng)
        return clean + self.noise[level][voxels, np.newaxis] * unit

    def _network(
        self,
        network: FingerprintEstimator,
        fit: ImageFit,
        signal: NDArray,
        refits: Mapping[str, NDArray],
        tubes: Mapping[str, NDArray],
    ) -> dict[str, Array]:
        """All that one network has to answer."""
        network.estimate(self.coefficients[:1])
        begin = perf_counter()
        measured = network.estimate(self.coefficients)
        seconds = perf_counter() - begin
        clean = network.estimate(signal)
        found = {
            "seconds": np.array(seconds),
            "slice/estimate": measured,
            "slice/clean": clean,
            "phantom": network.estimate(tubes["coefficients"]),
        }
        everyone, repeats = np.arange(len(signal)), self.scale.noises
        for level in NOISES:
            rng = self._rng(1, NOISES.index(level))
            total, square = np.zeros_like(clean), np.zeros_like(clean)
            for _ in tqdm(range(repeats), unit="image", desc=f"{level} noise"):
                noisy = self._noisy(fit, signal, everyone, level, rng)
                away = network.estimate(noisy) - clean
                total += away
                square += away**2
            mean = total / repeats
            variance = (square - repeats * mean**2) / (repeats - 1)
            found |= {
                f"slice/mean/{level}": clean + mean,
                f"slice/sd/{level}": np.sqrt(np.maximum(variance, 0)),
                f"refits/{level}": network.estimate(refits[f"noisy/{level}"]),
            }
        return found

    # --- the phantom -------------------------------------------------------------------------

    def _phantom(self) -> dict[str, Array]:
        """Fingerprints of six tubes in a head-sized cylinder, and their fits."""
        rng = self._rng(2)
        places, truth, tube = phantom(self.model, self.scale.tube, rng)
        signal = self.model.signal(truth)
        phase = np.exp(1j * np.pi * places[:, 0] / PHANTOM["radius"])[:, np.newaxis]
        clean = PHANTOM["snr"] * phase * signal
        noisy = ComplexGaussian(1.0).sample(clean, rng)
        fit = fit_nlls(self.model, noisy, starts=3, bounds=BOUNDS, progress=True)
        found = self._precision(fit.theta, np.full(len(truth), 1 / PHANTOM["snr"]))
        return {
            "places": places, "truth": truth, "tube": tube, "coefficients": noisy,
            "theta": fit.theta, "converged": fit.converged, "at bound": fit.at_bound,
            "sd": found["sd"],
        }  # fmt: skip


def phantom(
    model: MTModel, voxels: int, rng: np.random.Generator
) -> tuple[Array, Array, NDArray[np.intp]]:
    """Six tubes in a cylinder of the size of a head, B0 and B1 varying smoothly over it.

    Parameters
    ----------
    model : MTModel
    voxels : int
        Of each tube, at random places in its disc.
    rng : numpy.random.Generator

    Returns
    -------
    places : (6 voxels, 2)
        mm from the axis of the cylinder.
    theta : (6 voxels, 7)
    tube : (6 voxels,)
        Place in `TUBES`.
    """
    tube = np.repeat(np.arange(len(TUBES)), voxels)
    angle = 2 * np.pi * tube / len(TUBES)
    distance = PHANTOM["tube radius"] * np.sqrt(rng.uniform(size=len(tube)))
    turn = rng.uniform(0, 2 * np.pi, len(tube))
    places = PHANTOM["distance"] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    places = places + (distance * np.stack([np.cos(turn), np.sin(turn)])).T
    across, up = (places / PHANTOM["radius"]).T
    theta = np.empty((len(tube), len(model.names)))
    for name, column in zip(model.names, theta.T, strict=True):
        if name in TARGETS:
            column[:] = np.array([t[name] for t in TUBES.values()])[tube]
    theta[:, model.names.index("Rx")] = PHANTOM["Rx"]
    theta[:, model.names.index("T2s")] = T2S
    theta[:, model.names.index("B0")] = PHANTOM["B0"] * (across + 0.5 * (up**2 - across**2))
    centre, edge = PHANTOM["B1"]
    theta[:, model.names.index("B1")] = centre + (edge - centre) * (across**2 + up**2) + 0.1 * up
    return places, theta, tube


def _sides() -> dict[str, list]:
    """The polygons of each deep structure, one on either side."""
    found: dict[str, list] = {name: [] for name in DEEP}
    for name, corners in OUTLINES.items():
        found[name.rsplit(" ", 1)[0]].append(corners)
    return found


def _lagged(image: NDArray, inside: NDArray[np.bool_], lag: int, axis: int) -> float:
    """Correlation of the residuals of voxels that lie `lag` apart along an axis."""
    ahead, behind = [slice(None)] * 2, [slice(None)] * 2
    ahead[axis], behind[axis] = slice(lag, None), slice(None, -lag)
    both = inside[tuple(ahead)] & inside[tuple(behind)]
    a, b = image[tuple(ahead)][both], image[tuple(behind)][both]
    power = np.sqrt(np.sum(np.abs(a) ** 2) * np.sum(np.abs(b) ** 2))
    return float(np.sum(a * b.conj()).real / power) if power > 0 else np.nan


def _digest(network: FingerprintEstimator) -> str:
    """A name for the weights of an estimator."""
    digest = hashlib.sha256(network.basis.encode())
    for key, values in sorted(network.network.arrays().items()):
        digest.update(key.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:12]


class Results(StudyResults):
    """What a run has left: maps by least squares and by networks, and tables.

    Parameters
    ----------
    location : path, optional
        Folder of the results; by default the one that the book reads.

    Attributes
    ----------
    study : qmri.artefacts.Study
    step : int
        Every how manieth row and column of the slice was looked at.

    Raises
    ------
    MissingArtefacts
        If the study has not been run; the message names the command.
    """

    def __init__(self, location: str | Path | None = None):
        super().__init__("brain", location)
        self.step = self.study.settings["step"]

    @property
    def label(self) -> str:
        """The scale, as figures state it, and that of the networks if it is another."""
        of_networks = self.study.results["networks"]["scale"]
        more = "" if of_networks == self.study.scale else f", networks of {of_networks} scale"
        return self.study.label + more

    @property
    def nlls(self) -> dict[str, Array]:
        """Least squares in each voxel.

        Returns
        -------
        dict of str to array
            ``theta`` (voxels, 7); in scanner units ``m0``, the magnitude, ``sigma``, the noise
            of each real channel if all of the residual is noise, and ``noise``, the part that
            neighbours do not share; ``sd`` (voxels, 7), the root of the bound with ``sigma``;
            ``shift by T2s`` (voxels, 3), the change of the estimates per us of T2s;
            ``converged``; ``at bound`` (voxels, 7); ``passes`` and how many of them are
            ``agreeing``.
        """
        return self.arrays("slice")

    @property
    def regions(self) -> dict[str, NDArray[np.bool_]]:
        """Regions by name, (voxels,): ``tissue``, ``white matter``, ``pallidum``, ..."""
        return with_prefix(self.arrays("slice"), "region/")

    def estimate(self, name: str) -> Array:
        """m0s, T1 (s) and T2f (s) of each voxel by ``"nlls"``, ``"crb"`` or ``"mse"``."""
        check_choice("name", name, ("nlls", *NETWORKS))
        if name == "nlls":
            return self.nlls["theta"][:, : len(TARGETS)]
        return self._of(name)["estimate"]

    def _of(self, name: str) -> dict[str, Array]:
        check_choice("name", name, NETWORKS)
        return with_prefix(self.arrays("networks"), f"{name}/")

    def image(self, values: ArrayLike) -> Array:
        """Values of the voxels as an image with NaN outside of the brain.

        Parameters
        ----------
        values : (voxels,)

        Returns
        -------
        (rows, columns)
            Every `step`-th of them.
        """
        values = np.asarray(values, dtype=float)
        places = self.nlls["places"] // self.step
        if values.shape != (len(places),):
            raise ValueError(f"values must have shape ({len(places)},), got {values.shape}")
        image = np.full(-(-self.nlls["shape"] // self.step), np.nan)
        image[tuple(places.T)] = values
        return image

    def difference(self, name: str, noise: str = "local") -> dict[str, Array]:
        """What a network says more than least squares, and where that comes from.

        Parameters
        ----------
        name : str
            ``"crb"`` or ``"mse"``.
        noise : {"local", "residual"}
            Which of the two estimates of the noise is simulated.

        Returns
        -------
        dict of str to (voxels, 3)
            ``whole``, the sum of three: ``network``, what it says of the noise-free fingerprint
            at the least-squares estimate less that estimate; ``noise``, what white noise adds on
            average; and ``residual``, its answer to what the model has left, noise or not.
            ``noise sd`` is the standard deviation of that answer if the residual is white noise.
        """
        check_choice("noise", noise, NOISES)
        found, fit = self._of(name), self.estimate("nlls")
        return {
            "whole": found["estimate"] - fit,
            "network": found["clean"] - fit,
            "noise": found[f"mean/{noise}"] - found["clean"],
            "residual": found["estimate"] - found[f"mean/{noise}"],
            "noise sd": found[f"sd/{noise}"],
        }

    def agreement(self, name: str, region: str = "tissue") -> dict[str, Array]:
        """Correlation and Bland-Altman statistics of a network against least squares.

        Parameters
        ----------
        name : str
            ``"crb"`` or ``"mse"``.
        region : str

        Returns
        -------
        dict of str to (3,)
            ``correlation``, ``mean`` and ``sd`` of the difference, and the limits of agreement,
            ``low`` and ``high``.
        """
        inside = self.regions[region]
        x, y = self.estimate("nlls")[inside], self.estimate(name)[inside]
        mean, sd = (y - x).mean(axis=0), (y - x).std(axis=0, ddof=1)
        together = [np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, y.T, strict=True)]
        return {
            "correlation": np.array(together), "mean": mean, "sd": sd,
            "low": mean - 1.96 * sd, "high": mean + 1.96 * sd,
        }  # fmt: skip

    def contrast(self, name: str, region: str, against: str = "white matter") -> Array:
        """Mean of one region less that of another, (3,), by least squares or a network."""
        found = self.estimate(name)
        first, second = (self.regions[part] for part in (region, against))
        return found[first].mean(axis=0) - found[second].mean(axis=0)

    def contrast_error(self, region: str, against: str = "white matter") -> Array:
        """Standard error of the contrast by least squares, (3,)."""
        found, error = self.estimate("nlls"), 0.0
        for part in (region, against):
            values = found[self.regions[part]]
            error = error + values.var(axis=0, ddof=1) / len(values)
        return np.sqrt(error)

    def outside(self) -> dict[str, NDArray[np.bool_]]:
        """Voxels that the networks have not been trained for, by reason, each (voxels,).

        A parameter outside of its training range by least squares, or a signal-to-noise ratio
        (with the noise that neighbours do not share) below or above those of training.
        """
        fit, ranges = self.nlls, np.array(self.study.settings["ranges"])
        names = self.study.settings["parameters"]
        found = {
            name: (fit["theta"][:, p] < ranges[p, 0] - 1e-6 * np.abs(ranges[p, 0]))
            | (fit["theta"][:, p] > ranges[p, 1] * (1 + 1e-6))
            for p, name in enumerate(names)
            if name != "T2s"
        }
        snr = fit["m0"] / fit["noise"]
        low, high = self.study.settings["trained snr"]
        return {**found, "SNR low": snr < low, "SNR high": snr > high}

    def tubes(self, name: str) -> list[Array]:
        """Estimates in each tube of the phantom, (voxels, 3), in the order of `TUBES`.

        `name` is ``"truth"``, ``"nlls"``, ``"crb"`` or ``"mse"``.
        """
        check_choice("name", name, ("truth", "nlls", *NETWORKS))
        found = self.arrays("phantom")
        key = {"truth": "truth", "nlls": "theta"}.get(name, f"estimate/{name}")
        values = found[key][:, : len(TARGETS)]
        return [values[found["tube"] == k] for k in range(len(TUBES))]
