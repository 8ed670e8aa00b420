"""Images to maps: run any estimator over a masked slice or volume, read and write NIfTI.

Nothing here knows what kind of estimator it runs: maximum likelihood, a dictionary
and a network all have the one method, `Estimator.estimate`.
"""

import json
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import ArrayLike
from tqdm import tqdm

import qmri
from qmri.models import check_bvalues

__all__ = [
    "DiffusionImages",
    "Estimator",
    "ParameterMaps",
    "estimate_maps",
    "read_dwi",
    "write_maps",
]

VOXELS_PER_CALL = 4096  # bounds the memory of one call, and moves the progress bar
DESCRIPTION = "maps.json"
FILE_NAME = re.compile(r"\w[\w.+-]*")


class Estimator(Protocol):
    """Anything that maps noisy signals to tissue parameters.

    An estimator may also have ``units``, one string per name.

    Attributes
    ----------
    names : tuple of str
        Parameter names, in the order of the columns of the estimate.
    """

    names: tuple[str, ...]

    def estimate(self, signals: np.ndarray) -> np.ndarray:
        """Parameters of each voxel.

        Parameters
        ----------
        signals : (voxels, measurements)

        Returns
        -------
        (voxels, parameters)
            NaN where a voxel could not be estimated.
        """
        ...


class ParameterMaps(Mapping[str, np.ndarray]):
    """Named parameter maps: ``maps["f"]`` is an array of the images' spatial shape.

    Parameters
    ----------
    arrays : mapping of str to (*spatial) float
        One map per parameter, NaN outside the mask.
    units : mapping of str to str
        Unit of each map; ``"1"`` for a number without unit, empty if unknown.
    mask : (*spatial) bool
        Voxels that were asked for.
    invalid : (*spatial) bool
        Voxels inside the mask with a signal that is not a finite number. They are
        NaN in every map: no estimator has seen them.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        units: Mapping[str, str],
        mask: np.ndarray,
        invalid: np.ndarray,
    ) -> None:
        self._arrays = dict(arrays)
        self.units = MappingProxyType(dict(units))
        self.mask = mask
        self.invalid = invalid

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, in the estimator's order."""
        return tuple(self._arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    # Arrays have no single truth value, so maps compare by identity, not by content.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        maps = ", ".join(f"{name} [{self.units[name]}]" for name in self)
        return (
            f"<ParameterMaps {maps}; shape {self.mask.shape}, {self.mask.sum()} voxels in the "
            f"mask, {self.invalid.sum()} invalid>"
        )


def estimate_maps(
    estimator: Estimator,
    images: ArrayLike,
    mask: ArrayLike | None = None,
    units: Sequence[str] | None = None,
    progress: bool = False,
    *,
    bvalues: ArrayLike | None = None,
    snr: float | None = None,
) -> ParameterMaps:
    """Parameter maps of an image stack.

    Parameters
    ----------
    estimator : Estimator
        Anything with ``names`` and ``estimate(signals) -> parameters``.
    images : (*spatial, measurements)
        A voxel list, slice, volume or series of volumes, measurements last.
    mask : (*spatial) bool, optional
        Voxels to estimate; all of them by default.
    units : (parameters,) strings, optional
        Unit of each parameter; ``estimator.units`` by default, where it has them.
    progress : bool
        Show a progress bar.
    bvalues : (measurements,), optional
        s/mm2, of the images.
    snr : float, optional
        S0 / sigma of the images. An estimator that knows what it was trained for (one with a
        method ``require``, as stored networks have) needs both and refuses others.

    Returns
    -------
    ParameterMaps
        One (*spatial) float64 array per parameter: NaN outside the mask, NaN where
        the estimator gives NaN, and NaN where a signal is not finite. The last are
        never handed to the estimator; ``maps.invalid`` marks them.

    Raises
    ------
    ValueError
        If `images` are not real numbers with a measurement axis; if `mask` is not
        boolean, has another shape or is empty; if there is not one unit per
        parameter; if the estimator returns an array of the wrong shape; if it was
        trained for other b-values or another SNR, or these are not said.
    """
    if hasattr(estimator, "require"):
        for argument, value in (("bvalues", bvalues), ("snr", snr)):
            if value is None:
                raise ValueError(f"{argument} must be given for a trained estimator, {estimator!r}")
        estimator.require(bvalues=bvalues, snr=snr)
    images = _real_images(images)
    spatial = images.shape[:-1]
    mask = _checked_mask(mask, spatial)
    names = tuple(estimator.names)
    if units is None:
        units = getattr(estimator, "units", None) or ("",) * len(names)
    if len(units) != len(names):
        raise ValueError(
            f"units: expected one per parameter ({', '.join(names)}), got {tuple(units)!r}"
        )

    invalid = np.zeros(spatial, dtype=bool)
    theta = np.full((*spatial, len(names)), np.nan)
    voxels = np.flatnonzero(mask)
    with tqdm(total=len(voxels), unit=" voxels", disable=not progress) as bar:
        for first in range(0, len(voxels), VOXELS_PER_CALL):
            chunk = np.unravel_index(voxels[first : first + VOXELS_PER_CALL], spatial)
            signals = images[chunk].astype(np.float64)
            finite = np.isfinite(signals).all(axis=-1)
            invalid[chunk] = ~finite
            if finite.any():
                estimates = np.full((len(signals), len(names)), np.nan)
                estimates[finite] = _estimate(estimator, signals[finite], names)
                theta[chunk] = estimates
            bar.update(len(signals))
    return ParameterMaps(
        arrays={name: theta[..., i].copy() for i, name in enumerate(names)},
        units=dict(zip(names, units, strict=True)),
        mask=mask,
        invalid=invalid,
    )


def _real_images(images: ArrayLike) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype.kind == "c":
        raise ValueError("images: got complex numbers, expected real ones; take np.abs first")
    if images.dtype.kind not in "buif":
        raise ValueError(f"images: expected numbers, got dtype {images.dtype}")
    if images.ndim < 2:
        raise ValueError(f"images: expected shape (*spatial, measurements), got {images.shape}")
    return images


def _checked_mask(mask: ArrayLike | None, spatial: tuple[int, ...]) -> np.ndarray:
    if mask is None:
        mask = np.ones(spatial, dtype=bool)
    mask = np.array(mask)
    if mask.dtype != bool:
        raise ValueError(f"mask: expected bool, got {mask.dtype}; compare it first: mask > 0.5")
    if mask.shape != spatial:
        raise ValueError(f"mask: expected the images' spatial shape {spatial}, got {mask.shape}")
    if not mask.any():
        raise ValueError(f"mask: none of its {mask.size} voxels is True, there is nothing to do")
    return mask


def _estimate(estimator: Estimator, signals: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    theta = np.asarray(estimator.estimate(signals))
    expected = (len(signals), len(names))
    if theta.shape != expected:
        raise ValueError(
            f"estimator: {type(estimator).__name__}.estimate returned shape {theta.shape}, "
            f"expected (voxels, parameters) = {expected}"
        )
    if theta.dtype.kind not in "buif":
        raise ValueError(
            f"estimator: {type(estimator).__name__}.estimate returned {theta.dtype}, "
            "expected real numbers"
        )
    return theta


@dataclass(frozen=True, eq=False)
class DiffusionImages:
    """Diffusion-weighted volumes of one scan.

    Attributes
    ----------
    images : (x, y, z, measurements) float64
        Signals, in scanner units.
    bvalues : (measurements,) float64
        s/mm2.
    mask : (x, y, z) bool
        Voxels to estimate.
    affine : (4, 4) float64
        Voxel indices to millimetres, for `write_maps`.
    """

    images: np.ndarray
    bvalues: np.ndarray
    mask: np.ndarray
    affine: np.ndarray


def read_dwi(
    image: str | Path, bvals: str | Path, mask: str | Path | None = None
) -> DiffusionImages:
    """Read diffusion-weighted images, their b-values and a mask.

    b-values are taken as the file gives them, and at least one must be 0. Some
    scanners write 5 for their unweighted images; such a value is not rounded to 0
    here, because blood flow already attenuates the signal at b = 5 s/mm2. Write 0
    in the file if that is what was measured.

    Parameters
    ----------
    image : path
        4-D NIfTI file, volumes last.
    bvals : path
        Text file with one b-value per volume, in s/mm2, separated by white space.
    mask : path, optional
        3-D NIfTI file on the grid of `image`; voxels above 0.5 are estimated. All
        of them by default.

    Returns
    -------
    DiffusionImages
        Voxels that are not finite numbers stay as they are: `estimate_maps` leaves
        them out and counts them.

    Raises
    ------
    FileNotFoundError
        If one of the files does not exist.
    ValueError
        If a file cannot be read to its end, `image` is not 4-D or not real, the
        b-values are not valid (see `qmri.models.check_bvalues`) or not one per
        volume, or the mask is empty, has another shape or lies elsewhere in space.
    """
    bvalues = _read_bvalues(_existing("bvals", bvals))
    volumes = _open_nifti("image", image)
    if len(volumes.shape) != 4:
        raise ValueError(
            f"image: {image} has shape {volumes.shape}, expected 4-D (x, y, z, volumes)"
        )
    if len(bvalues) != volumes.shape[3]:
        raise ValueError(
            f"bvals: {bvals} holds {len(bvalues)} b-values, expected {volumes.shape[3]}, "
            f"one per volume of {image}"
        )
    inside = np.ones(volumes.shape[:3], dtype=bool)
    if mask is not None:
        inside = _read_mask(mask, volumes)
    return DiffusionImages(
        images=_voxels("image", volumes),
        bvalues=bvalues,
        mask=inside,
        affine=volumes.affine,
    )


def _existing(argument: str, path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}")
    return path


def _read_bvalues(path: Path) -> np.ndarray:
    try:
        words = path.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"bvals: {path} is not a text file") from error
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError as error:
            raise ValueError(f"bvals: {path} holds {word!r}, expected a number") from error
    try:
        return check_bvalues(values)
    except ValueError as error:
        raise ValueError(f"bvals: {path}: {error}") from error


# What nibabel and gzip raise for a file that is cut short or not an image at all.
_UNREADABLE = (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error)


def _open_nifti(argument: str, path: str | Path) -> nibabel.Nifti1Image:
    path = _existing(argument, path)
    try:
        return nibabel.load(path)
    except _UNREADABLE as error:
        raise ValueError(
            f"{argument}: {path} is not a NIfTI file or is cut short ({error})"
        ) from error


def _voxels(argument: str, image: nibabel.Nifti1Image) -> np.ndarray:
    dtype = image.get_data_dtype()
    if dtype.kind not in "buif":
        raise ValueError(f"{argument}: {image.get_filename()} holds {dtype}, expected real numbers")
    try:
        return image.get_fdata(dtype=np.float64, caching="unchanged")
    except _UNREADABLE as error:
        raise ValueError(
            f"{argument}: {image.get_filename()} is cut short or damaged ({error})"
        ) from error


def _read_mask(path: str | Path, volumes: nibabel.Nifti1Image) -> np.ndarray:
    mask = _open_nifti("mask", path)
    if mask.shape != volumes.shape[:3]:
        raise ValueError(
            f"mask: {path} has shape {mask.shape}, expected {volumes.shape[:3]} as the image has"
        )
    offset = _largest_offset(mask.affine, volumes.affine, mask.shape)
    voxel_size = nibabel.affines.voxel_sizes(volumes.affine).min()
    if not offset < 0.1 * voxel_size:
        raise ValueError(
            f"mask: {path} lies elsewhere in space: its affine puts a corner {offset:.3g} mm away "
            f"from the image's, expected less than a tenth of a voxel ({0.1 * voxel_size:.3g} mm)"
        )
    inside = _voxels("mask", mask) > 0.5
    if not inside.any():
        raise ValueError(f"mask: {path} has no voxel above 0.5, expected at least one")
    return inside


def _largest_offset(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """Largest distance in mm between the corners of one grid under two affines."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    homogeneous = np.column_stack([corners, np.ones(8)])
    return float(np.linalg.norm((homogeneous @ (first - second).T)[:, :3], axis=1).max())


def write_maps(
    maps: ParameterMaps,
    folder: str | Path,
    affine: ArrayLike,
    *,
    report: Mapping[str, object] | None = None,
    attachments: Mapping[str, bytes] | None = None,
) -> list[Path]:
    """Write one NIfTI file per parameter, and ``maps.json`` that describes them.

    Maps that an earlier call left in the folder are replaced as a whole: no reader ever sees
    half a map, and ``maps.json``, which is removed first and written last, never describes
    maps of another run. Other files in the folder are left alone.
    1-D and 2-D maps get trailing axes of length one, since viewers expect volumes.

    Parameters
    ----------
    maps : ParameterMaps
        As `estimate_maps` returns them.
    folder : path
        Where to write; it is made if it does not exist.
    affine : (4, 4)
        Voxel indices to millimetres, for example ``read_dwi(...).affine``.
    report : mapping, optional
        What else ``maps.json`` shall hold, in numbers and words; what stands under
        ``"parameters"``, a mapping by name, joins the entry of that parameter.
    attachments : mapping of file name to bytes, optional
        Further files of the same run, such as a picture.

    Returns
    -------
    list of pathlib.Path
        ``<name>.nii.gz`` (float32, unit in the header's description) for each
        parameter, the attachments, then ``maps.json`` with names, units, the version of this
        library, the share of invalid voxels, and `report`.

    Raises
    ------
    ValueError
        If `affine` is not a (4, 4) array of finite numbers, or if a parameter or an attachment
        has a name that cannot be a file name.
    """
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError(f"affine: expected (4, 4) finite numbers, got {affine.tolist()}")
    attachments = dict(attachments or {})
    for argument, names in (("maps: the parameter", maps), ("attachments: the", attachments)):
        for name in names:
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{argument} name {name!r} cannot be a file name")
    files = {name: f"{name}.nii.gz" for name in maps}
    written = [*files.values(), *attachments]
    if len({file.lower() for file in [*written, DESCRIPTION]}) < len(written) + 1:
        raise ValueError(f"maps: the names {(*maps.names, *attachments)} differ in case only")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as unfinished:
        for name, file in files.items():
            nibabel.save(_nifti(maps[name], name, maps.units[name], affine), Path(unfinished, file))
        for file, content in attachments.items():
            Path(unfinished, file).write_bytes(content)
        described = _description(maps, files, attachments, report or {})
        Path(unfinished, DESCRIPTION).write_text(_json(described) + "\n", encoding="utf-8")
        outdated = set(_described_files(folder / DESCRIPTION)) - set(written)
        (folder / DESCRIPTION).unlink(missing_ok=True)
        for file in outdated:
            (folder / file).unlink(missing_ok=True)
        return [Path(unfinished, file).replace(folder / file) for file in (*written, DESCRIPTION)]


def _described_files(description: Path) -> list[str]:
    """Files that an earlier call has left, as its ``maps.json`` lists them."""
    try:
        files = list(json.loads(description.read_text(encoding="utf-8"))["files"])
    except (FileNotFoundError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        return []  # none, or not one of ours: nothing that we might remove
    return [f for f in files if isinstance(f, str) and FILE_NAME.fullmatch(f)]


def _nifti(array: np.ndarray, name: str, unit: str, affine: np.ndarray) -> nibabel.Nifti1Image:
    shape = array.shape + (1,) * (3 - array.ndim)
    image = nibabel.Nifti1Image(array.reshape(shape).astype(np.float32), affine)
    label = f"{name} [{unit}]" if unit else name
    image.header["descrip"] = label.encode("utf-8")[:80]
    image.header.set_xyzt_units("mm")
    return image


def _json(described: Mapping[str, object]) -> str:
    """Text with lists of numbers, such as b-values, on one line."""
    text = json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[\s+([-+.\deE,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)


def _description(
    maps: ParameterMaps,
    files: Mapping[str, str],
    attachments: Iterable[str],
    report: Mapping[str, object],
) -> dict:
    voxels, invalid = int(maps.mask.sum()), int(maps.invalid.sum())
    report = dict(report)
    more = report.pop("parameters", {})
    return {
        "qmri_version": qmri.__version__,
        **report,
        "parameters": [
            {"name": name, "unit": maps.units[name], "file": files[name], **more.get(name, {})}
            for name in maps
        ],
        "voxels_in_mask": voxels,
        "invalid_voxels": invalid,
        "invalid_share": invalid / voxels,
        "files": [*files.values(), *attachments],
    }
