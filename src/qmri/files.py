"""From files to files: diffusion-weighted NIfTI images become parameter maps.

``qmri estimate`` on the command line and `estimate_files` in a notebook are the same thing.
"""

from __future__ import annotations

import difflib
import io
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import nibabel
import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmri._choices import check_choice
from qmri.mle import fit_mle
from qmri.models import IVIM, Array, Parameter, SignalModel
from qmri.networks import NetworkEstimator
from qmri.noise import Gaussian, Noise, Rician, sigma_from_variances
from qmri.pretrained import estimators, load_estimator
from qmri.volumes import DiffusionImages, ParameterMaps, estimate_maps, read_dwi, write_maps

__all__ = ["MODELS", "NOISES", "FileEstimates", "estimate_files", "network_names"]

logger = logging.getLogger(__name__)

MODELS: Mapping[str, type[SignalModel]] = MappingProxyType({"ivim": IVIM})
NOISES: Mapping[str, type[Noise]] = MappingProxyType({"rician": Rician, "gaussian": Gaussian})
LIKELIHOOD = "mle"
QUICK_LOOK = "quick-look.png"

# A mean at b = 0 so many sigma high is signal: noise alone has a mean of 1.25 sigma, and from
# here on the spread of a magnitude is sigma to within 3 %.
SIGNAL = 3.0
VOXELS_TO_FIT = 10_000  # for sigma
PERCENTILES = (5, 95)  # of the estimates: ends of the quick look's colours
SLICES = 3  # in the quick look, at most
AMPLITUDE_UNIT = "a.u."  # that of the images


@dataclass(frozen=True, eq=False)
class FileEstimates:
    """What `estimate_files` found and wrote.

    Attributes
    ----------
    maps : ParameterMaps
    report : dict
        The content of ``maps.json``.
    files : tuple of pathlib.Path
        One NIfTI file for each parameter, ``quick-look.png``, and ``maps.json``.
    """

    maps: ParameterMaps
    report: dict
    files: tuple[Path, ...]


def network_names(model: str = "ivim") -> tuple[str, ...]:
    """Names of the trained networks that `estimate_files` can use for a model."""
    own = [name for name in estimators() if _is_for(model, name)]
    # Without its SNR a name stands for the networks of all SNRs.
    return tuple(dict.fromkeys([*(re.sub(r"/snr\d+/", "/", name) for name in own), *own]))


def _is_for(model: str, name: str) -> bool:
    return re.match(rf"{model}(-[a-z]+)*/", str(name)) is not None


def estimate_files(
    image: str | Path,
    bvals: str | Path,
    out: str | Path,
    mask: str | Path | None = None,
    *,
    model: str = "ivim",
    noise: str = "rician",
    estimator: str = LIKELIHOOD,
    sigma: float | None = None,
    progress: bool = False,
) -> FileEstimates:
    """Parameter maps of diffusion-weighted images, from files to files.

    Parameters
    ----------
    image : path
        4-D NIfTI file of magnitude images, volumes last.
    bvals : path
        Text file with one b-value per volume, s/mm2.
    out : path
        Folder for the maps; it is made if it does not exist. Maps of an earlier run are
        replaced as a whole, other files in it are left alone.
    mask : path, optional
        3-D NIfTI file on the grid of `image`; voxels above 0.5 are estimated. By default those
        whose mean at b = 0 is above 3 sigma.
    model : {"ivim"}
    noise : {"rician", "gaussian"}
        What maximum likelihood assumes. All networks have learnt Rician noise.
    estimator : str
        ``"mle"``, or one of `network_names`.
    sigma : float, optional
        Noise in each channel, in the unit of the images. By default it comes from repeated
        images at b = 0, or, if there is one only, from the residuals of a Gaussian fit. The
        median over the voxels with signal counts, so that the few that pulsate, move or do not
        follow the model do not.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    FileEstimates

    Raises
    ------
    FileNotFoundError
        If one of the files does not exist.
    ValueError
        As `qmri.volumes.read_dwi` does; if `model`, `noise` or `estimator` is unknown; if the
        images do not suit the estimator; if `sigma` is not positive or cannot be found; if no
        voxel can be estimated; if `out` is a file, or a map would replace an input.
    MissingArtefacts
        If the study that trains the network has not been run.

    Notes
    -----
    Maximum likelihood takes all images as they are. A network expects one image at each of its
    b-values. Images in another order are sorted. As many images at each b-value are averaged,
    which divides sigma by the root of their number; it does not lower the noise floor, so that
    this is refused where half the voxels come near it. More images at some b-values than at
    others are refused: their averages would not have the even noise that a network has learnt.
    """
    _check_choices(model, noise, estimator, sigma)
    inputs = {"image": image, "bvals": bvals, "mask": mask}
    dwi = read_dwi(image, bvals, mask)
    physics = MODELS[model](dwi.bvalues)
    _check_bvalues(bvals, physics)
    out = Path(out)
    _check_out(out, physics, [Path(path) for path in inputs.values() if path is not None])

    level = dwi.images[..., dwi.bvalues == 0].mean(axis=-1)
    finite = np.isfinite(dwi.images).all(axis=-1)
    found, source = (float(sigma), "given") if sigma is not None else _sigma(dwi, physics, finite)
    inside = dwi.mask
    if mask is None:
        inside = ~(level <= SIGNAL * found)  # with those that are no numbers, which are counted
    seen = inside & finite
    if not seen.any():
        raise ValueError(
            f"image: none of the {inside.sum()} voxels to estimate in {image} holds finite numbers"
            if inside.any()
            else f"image: no voxel of {image} has a mean at b = 0 above {SIGNAL:g} sigma, where "
            f"sigma is {found:.4g} ({source})"
        )
    snr = float(np.median(level[seen]) / found)
    if not snr > 0:
        raise ValueError(
            f"image: the median signal of {image} at b = 0 is {snr * found:.4g}, expected "
            "magnitudes"
        )
    logger.info("sigma: %.4g (%s); median SNR at b = 0: %.3g", found, source, snr)
    if left_out := int((inside & ~finite).sum()):
        logger.info("left out: %d voxels that are not finite", left_out)

    if estimator == LIKELIHOOD:
        fitted = _Likelihood(physics, NOISES[noise](found), float(level[seen].max()))
        maps, findings = _by_likelihood(fitted, dwi, inside, progress)
    else:
        maps, findings = _by_network(estimator, dwi, inside, found, snr, progress)
    estimated = np.isfinite(maps[maps.names[0]])
    if not estimated.any():
        raise ValueError(
            f"image: none of {seen.sum()} voxels of {image} could be estimated; negative numbers "
            f"are impossible under {noise} noise"
        )
    report = {
        "model": model,
        "estimator": estimator,
        "noise": noise,
        "sigma": found,
        "sigma_from": source,
        "median_snr": snr,
        "bvalues": dwi.bvalues.tolist(),
        "bvalue_unit": "s/mm2",
        "inputs": {name: Path(path).name if path else None for name, path in inputs.items()},
        "mask_rule": "above 0.5" if mask is not None else f"mean at b = 0 above {SIGNAL:g} sigma",
        "share_not_estimated": float(np.mean(~estimated[seen])),
        **findings,
        "quick_look": QUICK_LOOK,
    }
    title = f"{model}: {estimator}, {noise} noise, sigma = {found:.4g}"
    picture = _quick_look(maps, level, dwi.affine, physics.parameters, title)
    files = write_maps(maps, out, dwi.affine, report=report, attachments={QUICK_LOOK: picture})
    written = json.loads(files[-1].read_text(encoding="utf-8"))
    return FileEstimates(maps=maps, report=written, files=tuple(files))


# --- what is asked for ----------------------------------------------------------------------


def _check_choices(model: str, noise: str, estimator: str, sigma: float | None) -> None:
    check_choice("model", model, MODELS)
    check_choice("noise", noise, NOISES)
    if sigma is not None and not (np.ndim(sigma) == 0 and np.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be a positive number, got {sigma!r}")
    if estimator == LIKELIHOOD:
        return
    names = network_names(model)
    if estimator not in names:
        if _is_for(model, estimator):
            load_estimator(estimator)  # which says whether it is unknown or was not trained yet
        near = difflib.get_close_matches(str(estimator), names, n=4, cutoff=0.4)
        raise ValueError(
            f"estimator must be {LIKELIHOOD!r} or the name of a network trained for {model}, got "
            f"{estimator!r}" + (f"; nearest: {', '.join(near)}" if near else "")
        )
    if noise != "rician":
        raise ValueError(
            f"noise is {noise!r}, but {estimator} has learnt Rician noise; the choice is for "
            f"{LIKELIHOOD!r}"
        )


def _check_bvalues(bvals: str | Path, physics: SignalModel) -> None:
    different = len(np.unique(physics.bvalues))
    needed = len(physics.parameters)
    if different < needed:
        raise ValueError(
            f"bvals: {bvals} holds {different} different b-values, expected {needed} or more, as "
            f"many as there are parameters ({', '.join(physics.names)})"
        )


def _check_out(out: Path, physics: SignalModel, inputs: Sequence[Path]) -> None:
    """Before anything is computed."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    written = {(out / file).resolve() for file in (*map(_nifti_name, physics.names), QUICK_LOOK)}
    for path in inputs:
        if path.resolve() in written:
            raise ValueError(f"out: a map would replace the input {path}, name another folder")


def _nifti_name(name: str) -> str:
    return f"{name}.nii.gz"


# --- noise ----------------------------------------------------------------------------------


def _sigma(dwi: DiffusionImages, physics: SignalModel, finite: NDArray) -> tuple[float, str]:
    """Noise level, and in words where it is from."""
    signals = dwi.images[dwi.mask & finite]
    if len(signals) == 0:
        raise ValueError(f"image: none of {dwi.mask.sum()} voxels holds finite numbers only")
    unweighted = signals[:, dwi.bvalues == 0]
    repeats = unweighted.shape[1]
    freedom = signals.shape[1] - len(physics.parameters)
    if repeats > 1:
        variance, freedom = unweighted.var(axis=1, ddof=1), repeats - 1
        source = f"{repeats} images at b = 0"
    elif freedom > 0:
        # Fits take time, and some thousand voxels are enough for a median.
        signals = signals[:: -(-len(signals) // VOXELS_TO_FIT)]
        unweighted = signals[:, dwi.bvalues == 0]
        variance = _residual_variance(signals, physics)
        source = "residuals of a Gaussian fit"
    else:
        raise ValueError(
            f"sigma must be given: one image at b = 0 and {signals.shape[1]} images for "
            f"{len(physics.parameters)} parameters tell nothing of the noise"
        )
    sigma, voxels = _typical_sigma(variance, freedom, unweighted.mean(axis=1))
    return sigma, f"{source}, median of {voxels} voxels"


def _residual_variance(signals: Array, physics: SignalModel) -> Array:
    largest = float(signals.max())
    if not largest > 0:
        raise ValueError("image: no voxel to estimate holds a positive signal")
    # The estimates of a Gaussian fit do not depend on sigma, only when it ends does.
    fitted = _Likelihood(physics, Gaussian(largest / 100), largest).fit(signals).theta
    residuals = signals - physics.signal(fitted)
    return np.sum(residuals**2, axis=1) / (signals.shape[1] - len(physics.parameters))


def _typical_sigma(variance: Array, freedom: int, level: Array) -> tuple[float, int]:
    """Noise level from the variances of the voxels with signal, and how many these are.

    Which voxels have signal depends on sigma, so both are found in turn.
    """
    chosen, sigma = np.ones(len(variance), dtype=bool), 0.0
    for _ in range(20):
        sigma = sigma_from_variances(variance[chosen], freedom)
        above = level > SIGNAL * sigma
        if not above.any() or np.array_equal(above, chosen):
            break
        chosen = above
    if not sigma > 0:
        raise ValueError(
            "sigma must be given: half the voxels with signal show no noise at all, as in images "
            "that were computed or rounded"
        )
    if not above.any():
        raise ValueError(
            f"sigma must be given: no voxel has a mean at b = 0 above {SIGNAL:g} times the "
            f"spread of its signals, {sigma:.4g}"
        )
    return sigma, int(chosen.sum())


# --- estimators -----------------------------------------------------------------------------


class _Likelihood:
    """Maximum likelihood that also tells whether it has converged, as one column more.

    Parameters
    ----------
    physics, noise
    largest : float
        Signal; the amplitude is bounded well above it, whatever the unit of the images.
    """

    CONVERGED = "converged"

    def __init__(self, physics: SignalModel, noise: Noise, largest: float):
        self.physics, self.noise = physics, noise
        self.bounds = {physics.amplitude: (0.0, 10 * largest)}
        self.limits = physics.check_bounds(self.bounds)
        self.names, self.units = (*physics.names, self.CONVERGED), (*_units(physics), "1")

    def fit(self, signals: Array):
        return fit_mle(self.physics, self.noise, signals, bounds=self.bounds)

    def estimate(self, signals: Array) -> Array:
        fit = self.fit(signals)
        return np.column_stack([fit.theta, fit.converged])


class _PerVoxelScale:
    """A network for signals of amplitude 1: each voxel is divided by its mean at b = 0."""

    def __init__(self, network: NetworkEstimator):
        self.network, self.names, self.units = network, network.names, network.units
        self.require = network.require

    def estimate(self, signals: Array) -> Array:
        model = self.network.model
        level = signals[:, model.bvalues == 0].mean(axis=1)
        theta, usable = np.full((len(signals), len(self.names)), np.nan), level > 0
        theta[usable] = self.network.estimate(signals[usable] / level[usable, np.newaxis])
        theta[:, self.names.index(model.amplitude)] *= level
        return theta


def _units(physics: SignalModel) -> tuple[str, ...]:
    return tuple(
        AMPLITUDE_UNIT if p.name == physics.amplitude else p.unit for p in physics.parameters
    )


def _by_likelihood(
    fitted: _Likelihood, dwi: DiffusionImages, inside: NDArray, progress: bool
) -> tuple[ParameterMaps, dict]:
    maps = estimate_maps(fitted, dwi.images, inside, progress=progress)
    seen = inside & ~maps.invalid
    parameters = {}
    for name, (low, high) in zip(fitted.physics.names, fitted.limits.tolist(), strict=True):
        parameters[name] = {
            "bounds": [low, high],
            "share_at_lower_bound": float(np.mean(maps[name][seen] == low)),
            "share_at_upper_bound": float(np.mean(maps[name][seen] == high)),
        }
    findings = {
        "share_not_converged": float(np.mean(maps[fitted.CONVERGED][seen] != 1)),
        "parameters": parameters,
    }
    names = fitted.physics.names
    only = {name: maps[name] for name in names}
    units = {name: maps.units[name] for name in names}
    return ParameterMaps(only, units, maps.mask, maps.invalid), findings


def _by_network(
    name: str, dwi: DiffusionImages, inside: NDArray, sigma: float, snr: float, progress: bool
) -> tuple[ParameterMaps, dict]:
    images, bvalues, averaged = _one_image_per_bvalue(name, dwi)
    sigma, snr = sigma / np.sqrt(averaged), snr * np.sqrt(averaged)
    if re.search(r"/snr\d+/", name):
        network = load_estimator(name, bvalues=bvalues)
        estimator, trained = _PerVoxelScale(network), (0.8 * network.snr, 1.2 * network.snr)
    else:
        network = estimator = load_estimator(name, bvalues=bvalues, sigma=sigma)
        trained = network.snr_range
    network.require(snr=snr)

    seen = inside & np.isfinite(images).all(axis=-1)
    findings = {"images_averaged": averaged}
    if averaged > 1:
        weakest = images[seen].min(axis=-1) / (sigma * np.sqrt(averaged))
        findings["share_near_noise_floor"] = float(np.mean(weakest < SIGNAL))
        if findings["share_near_noise_floor"] > 0.5:
            raise ValueError(
                f"estimator: {name} takes one image per b-value. Averaging {averaged} would not "
                f"lower the noise floor, and half the voxels have signals below {SIGNAL:g} sigma; "
                f"give it one image per b-value, or use {LIKELIHOOD!r}"
            )
    maps = estimate_maps(
        estimator, images, inside, _units(network.model), progress, bvalues=bvalues, snr=snr
    )
    own = images[seen][:, bvalues == 0].mean(axis=-1) / sigma
    findings["trained_for_snr"] = list(trained)
    findings["share_outside_trained_snr"] = float(np.mean((own < trained[0]) | (own > trained[1])))
    findings["parameters"] = {}
    for parameter in network.model.parameters:
        if parameter.name != network.model.amplitude:
            values, (low, high) = maps[parameter.name][seen], parameter.training
            values = values[np.isfinite(values)]
            findings["parameters"][parameter.name] = {
                "trained_for": [low, high],
                "share_outside_training": float(np.mean((values < low) | (values > high))),
            }
    return maps, findings


def _one_image_per_bvalue(name: str, dwi: DiffusionImages) -> tuple[Array, Array, int]:
    """Images sorted by b-value, averaged where there are as many of each."""
    bvalues, counts = np.unique(dwi.bvalues, return_counts=True)
    if counts.min() < counts.max():
        few, many = bvalues[counts.argmin()], bvalues[counts.argmax()]
        raise ValueError(
            f"estimator: {name} takes one image per b-value, or as many of each, but there are "
            f"{counts.max()} at b = {many:g} and {counts.min()} at b = {few:g}; averages over them "
            f"would not have the even noise that it has learnt; give it as many of each, or use "
            f"{LIKELIHOOD!r}"
        )
    images = np.stack([dwi.images[..., dwi.bvalues == b].mean(axis=-1) for b in bvalues], axis=-1)
    return images, bvalues, int(counts[0])


# --- quick look -----------------------------------------------------------------------------


def _quick_look(
    maps: ParameterMaps,
    level: Array,
    affine: ArrayLike,
    parameters: Iterable[Parameter],
    title: str,
) -> bytes:
    """PNG of the image at b = 0 and of each map: some slices, one below the other.

    Seen from the feet with the front up, as radiologists do, if the affine is right; cropped to
    the voxels that were estimated.
    """
    # Here, so that all that draws nothing does not wait for Matplotlib. Its `Figure` needs no
    # display and leaves the figures of a notebook alone.
    from matplotlib.figure import Figure

    from qmri.figures import axis_label, draw_map

    seen = maps.mask & ~maps.invalid
    upright = _upright(seen.astype(np.float32), affine)[0]
    rows, columns = (_extent(upright.any(axis=axes)) for axes in ((1, 2), (0, 2)))
    filled = upright.sum(axis=(0, 1)).cumsum()
    parts = (np.arange(SLICES) + 0.5) / SLICES * filled[-1]
    slices = np.unique(np.searchsorted(filled, parts))

    def mosaic(volume: Array) -> tuple[Array, float]:
        upright, aspect = _upright(volume, affine)
        upright = upright[rows, columns]
        gap = np.full((1, upright.shape[1]), np.nan)
        return np.concatenate([part for k in slices for part in (gap, upright[..., k])][1:]), aspect

    unweighted, aspect = mosaic(level)
    brightest = float(np.percentile(level[seen], PERCENTILES[1]))
    panels = [(unweighted, (0.0, brightest), f"$b = 0$ ({AMPLITUDE_UNIT})", "gray")]
    for parameter in parameters:
        parameter = replace(parameter, unit=maps.units[parameter.name])
        values = maps[parameter.name]
        low, high = np.nanpercentile(values, PERCENTILES).tolist()
        if not low < high:
            low, high = low - 0.5, low + 0.5
        panels.append((mosaic(values)[0], (low, high), axis_label(parameter), "viridis"))

    width = 2.4
    height = float(np.clip(width * aspect * unweighted.shape[0] / unweighted.shape[1], 1.0, 9.0))
    figure = Figure(figsize=(width * len(panels) + 0.4, height + 1.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (values, limits, label, colours) in zip(axes, panels, strict=True):
        draw_map(panel, values, limits, label, colours)
        panel.set_aspect(aspect)
    axes[0].text(0.02, 0.5, "R", color="white", transform=axes[0].transAxes, va="center")
    figure.suptitle(title, fontsize=11)
    low, high = PERCENTILES
    legend = [f"colours: percentiles {low} to {high} of the voxels", "R: the subject's right"]
    if len(filled) > 1:
        numbers = ", ".join(str(k) for k in slices)
        legend.append(f"top to bottom: slice {numbers} of {len(filled)} from the feet, from 0")
    figure.supxlabel("; ".join(legend), fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, facecolor="white")
    return file.getvalue()


def _extent(filled: NDArray[np.bool_], margin: int = 3) -> slice:
    """From the first to the last True, and a little more."""
    first, last = np.flatnonzero(filled)[[0, -1]]
    return slice(max(first - margin, 0), last + margin + 1)


def _upright(volume: Array, affine: ArrayLike) -> tuple[Array, float]:
    """(rows, columns, slices) with the front up and the subject's right at the left.

    Also the height of a voxel over its width.
    """
    image = nibabel.as_closest_canonical(
        nibabel.Nifti1Image(np.asarray(volume, dtype=np.float32), affine)
    )
    x, y, _ = image.header.get_zooms()[:3]
    return np.asarray(image.dataobj)[::-1, ::-1].swapaxes(0, 1), float(y / x)
