"""Public data: where each file comes from, how it is verified, what it holds.

Nothing here is part of the project: every file is fetched from its authors'
public repository, compared with a known SHA-256, and kept in a per-user cache.
A folder named by the environment variable ``QMRI_DATA_DIR`` that already holds
the files (``<folder>/ivim-abdomen/volunteer1.mat`` and so on) is used first.
"""

import difflib
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import h5py
import numpy as np
import requests
import scipy.io
from tqdm import TqdmWarning

with warnings.catch_warnings():
    # Importing pooch in a notebook would advise to install widgets for progress bars.
    warnings.simplefilter("ignore", TqdmWarning)
    import pooch

__all__ = [
    "SOURCES",
    "AbdominalScan",
    "CorruptFile",
    "DataUnavailable",
    "MTSlice",
    "RelaxometryScan",
    "Source",
    "fetch",
    "is_available",
    "load_abdomen",
    "load_mt_basis",
    "load_mt_pulses",
    "load_mt_slice",
    "load_phantom",
    "load_relaxometry",
]

# Connecting is tried at each of the server's addresses in turn, so that without a
# network the whole attempt ends within about ten seconds.
TIMEOUT_SECONDS = (2.5, 10.0)  # to connect to one address, between two pieces of the body


class DataUnavailable(RuntimeError):
    """A public file is neither on this computer nor within reach.

    The message is one sentence that says what is missing and how to get it.
    A notebook shows that sentence alone instead of a traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class CorruptFile(RuntimeError):
    """A file does not hold the bytes that its registered SHA-256 promises."""


@dataclass(frozen=True)
class Source:
    """One public file.

    Attributes
    ----------
    name : str
        ``<collection>/<file>``, the name that `fetch` takes.
    url : str
        The public address, pinned to one commit.
    sha256 : str
        Checksum of the file, 64 hexadecimal digits.
    licence : str
        Terms under which the authors share the file.
    citation : str
        What to cite when the file is used.
    """

    name: str
    url: str
    sha256: str
    licence: str
    citation: str


def _collection(
    folder: str,
    repository: str,
    commit: str,
    path: str,
    licence: str,
    citation: str,
    files: Mapping[str, str],
) -> dict[str, Source]:
    base = f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"
    return {
        f"{folder}/{file}": Source(f"{folder}/{file}", base + file, sha256, licence, citation)
        for file, sha256 in files.items()
    }


SOURCES: Mapping[str, Source] = MappingProxyType(
    _collection(
        folder="ivim-abdomen",
        repository="awetscherek/ivim_tools",
        commit="8a85f923f6748abc3c2c9cfac17e7cf987315273",
        path="data/",
        licence="BSD 2-Clause, (c) 2014 Andreas Wetscherek",
        citation=(
            "Wetscherek, Stieltjes, Laun: Flow-compensated intravoxel incoherent motion "
            "diffusion imaging. Magnetic Resonance in Medicine 2015, doi:10.1002/mrm.25410"
        ),
        files={
            "volunteer1.mat": "afb46f216099d35d36b6923048d93f390d63e355cfbbd7cc0647ffdb74dc5f2f",
            "volunteer2.mat": "6cb9dab3bd0442fc3ff0d29882ff6683d9b2ddcf1156ff7b3b08c2064d4bff6c",
            "volunteer3.mat": "fa164a70ece6115450ab252572b100393a696baa05bd9ed9eedb0446d1812d0c",
            "volunteer4.mat": "a8bf46b5a73faa93f39147bebb61769631f468d5753f50ce2d49da7be013775c",
            "volunteer5.mat": "002a44425c1891e76fdd554d2b212b87553102453862e80bfe1fb22bc8d7750e",
            "volunteer6.mat": "f7fcad93670fc965b2afc12b5f8f3ace96c2890f19cffa72aae39e70ab2a3df9",
            "phantom_static.mat": (
                "e1fdc236205c264f6146d185c572bede9327f45b1ec25e71c7606c5b3d738bfb"
            ),
            "phantom_flow.mat": "6be63bd5ef96e39d5532fb7ce3763e8c7127fa29723eed4cac7ace0778f10bdd",
        },
    )
    | _collection(
        folder="mt-brain",
        repository="quentin-duchemin/MRF-CRBLoss",
        commit="c949b1d76aec232829b4abb8bd8f378ddf7e148f",
        path="paper_data/",
        licence="none stated: use it from its source, do not redistribute it",
        citation=(
            "Zhang et al.: Cramér-Rao bound-informed training of neural networks for "
            "quantitative MRI. Magnetic Resonance in Medicine 2022, doi:10.1002/mrm.29206"
        ),
        files={
            "invivo_test_slice.mat": (
                "8f0c7f8ace889e770818a47eaa434daf39176b58056a5cf320d205a5719bb8f4"
            ),
            "basis_for_compress.mat": (
                "f4e07ba7cf9b323e0e1b03fbe7d4b7f558fc1289861f24bb56bd0996df7fe55b"
            ),
        },
    )
    | _collection(
        folder="mt-brain",
        repository="JakobAsslaender/MRIgeneralizedBloch.jl",
        commit="65ea1cf23c454c921dca9e31cf78e3f28bef8ba1",
        path="docs/",
        licence="MIT, (c) 2021 Jakob Assländer",
        citation=(
            "Assländer et al.: Generalized Bloch model: a theory for pulsed magnetization "
            "transfer. Magnetic Resonance in Medicine 2022, doi:10.1002/mrm.29071"
        ),
        files={
            "control_MT_v3p2_TR3p5ms_discretized.mat": (
                "1c4058f3b894b923144d2c08e0e7853f95f2bfdc83fb48c1dbe0c14cb4a663d1"
            ),
        },
    )
    | _collection(
        folder="relaxometry-brain",
        repository="fsantini/qMRI_example",
        commit="3d6fe9ca50faafd4462dcc29a3d3e27cc6cd32a4",
        path="",
        licence="MIT",
        citation="Francesco Santini: qMRI_example, https://github.com/fsantini/qMRI_example",
        files={
            "t1dataset.npy": "0f28f652c6e1292b720f6aee4810588f8603da59f6fe7f7ee93a7b9e8c7148c1",
            "t2dataset.npy": "2e1d8fe12bf61c85135ffa10b0bf39ba9b2698e96c2a7e0ac868164bfdf7ed33",
        },
    )
)


def fetch(name: str) -> Path:
    """Path of a public file, on this computer and verified.

    The file is looked for in the folder that ``QMRI_DATA_DIR`` names, then in the
    per-user cache (``QMRI_CACHE_DIR`` moves it), and is downloaded into the cache
    if neither holds it. Both variables are read at each call.

    A damaged file in the cache is removed and downloaded again. A damaged file in
    ``QMRI_DATA_DIR`` is refused and left alone: that folder belongs to the reader.

    Parameters
    ----------
    name : str
        A key of `SOURCES`, for example ``"ivim-abdomen/volunteer1.mat"``.

    Returns
    -------
    pathlib.Path
        A file whose SHA-256 is the registered one.

    Raises
    ------
    ValueError
        If `name` is not in `SOURCES`; the message lists the nearest names.
    DataUnavailable
        If the file is not on this computer and cannot be downloaded.
    CorruptFile
        If the file in ``QMRI_DATA_DIR``, or what the server sends, is not the
        registered one. A download that fails this test is not kept.
    """
    source = _lookup(name)
    own = _reader_file(source)
    if own is not None:
        _verify(own, source)
        return own
    cached = _cache_folder() / source.name
    removed = False
    if cached.is_file():
        try:
            _verify(cached, source)
            return cached
        except CorruptFile:
            cached.unlink()
            removed = True
    try:
        try:
            _download(source, cached)
        except (CorruptFile, requests.exceptions.ChunkedEncodingError):
            # A transfer that broke off or arrived altered often succeeds when repeated.
            _download(source, cached)
    except requests.exceptions.RequestException as error:
        if error.response is not None:
            error.response.close()
        raise DataUnavailable(_how_to_get(source, _reason(source, error), removed)) from error
    except OSError as error:
        reason = f"the cache {_cache_folder()} cannot be written ({error.strerror or error})"
        raise DataUnavailable(_how_to_get(source, reason, removed)) from error
    return cached


def is_available(name: str) -> bool:
    """Whether `fetch` would succeed without a network.

    Parameters
    ----------
    name : str
        A key of `SOURCES`.

    Returns
    -------
    bool
        True if a verified copy is in ``QMRI_DATA_DIR`` or in the cache.

    Raises
    ------
    ValueError
        If `name` is not in `SOURCES`.
    """
    source = _lookup(name)
    path = _reader_file(source) or _cache_folder() / source.name
    return path.is_file() and pooch.file_hash(path) == source.sha256


def _lookup(name: str) -> Source:
    if name in SOURCES:
        return SOURCES[name]
    near = difflib.get_close_matches(str(name), SOURCES, n=6, cutoff=0.5) or SOURCES
    nearest = ", ".join(known for known in SOURCES if known in near)
    raise ValueError(f"name: {name!r} is no public file of this book; nearest: {nearest}")


def _reader_file(source: Source) -> Path | None:
    folder = os.environ.get("QMRI_DATA_DIR")
    if not folder:
        return None
    path = Path(folder).expanduser() / source.name
    return path if path.is_file() else None


def _cache_folder() -> Path:
    return Path(os.environ.get("QMRI_CACHE_DIR") or pooch.os_cache("qmri")).expanduser()


def _verify(path: Path, source: Source, origin: str = "") -> None:
    found = pooch.file_hash(path)
    if found != source.sha256:
        raise CorruptFile(
            f"{origin or path} is not the registered {source.name}: its SHA-256 is {found} "
            f"({path.stat().st_size} bytes), expected {source.sha256}"
        )


def _download(source: Source, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, partial_name = tempfile.mkstemp(
        dir=destination.parent, prefix=f".{destination.name}.", suffix=".part"
    )
    os.close(handle)
    partial = Path(partial_name)
    download = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=TIMEOUT_SECONDS)
    try:
        download(source.url, str(partial), None)
        _verify(partial, source, origin=source.url)
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)


def _reason(source: Source, error: requests.exceptions.RequestException) -> str:
    server = urlsplit(source.url).netloc
    if isinstance(error, requests.exceptions.HTTPError):
        return f"{server} answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return f"the transfer from {server} broke off"
    return f"{server} cannot be reached"


def _how_to_get(source: Source, reason: str, removed: bool) -> str:
    folder = os.environ.get("QMRI_DATA_DIR")
    absent = f"is neither in QMRI_DATA_DIR ({folder}) nor" if folder else "is not"
    damaged = " (a damaged copy was removed)" if removed else ""
    return (
        f"{source.name} {absent} in the cache{damaged}, and {reason}: connect to the internet "
        f"once, or set QMRI_DATA_DIR to a folder that holds {source.name}, from {source.url}"
    )


@dataclass(frozen=True, eq=False)
class AbdominalScan:
    """Repeated diffusion-weighted images of one slice.

    Attributes
    ----------
    images : (rows, columns, measurements) float64
        Magnitude images, in scanner units.
    bvalues : (measurements,) float64
        Diffusion weighting of each image, s/mm2.
    diffusion_times : (measurements,) float64
        Diffusion time of each image, ms.
    mask : (rows, columns) bool
        Where the authors evaluate: inside the body, or the whole phantom image.
    regions : dict of str to (rows, columns) bool
        Named regions drawn by the authors.
    """

    images: np.ndarray
    bvalues: np.ndarray
    diffusion_times: np.ndarray
    mask: np.ndarray
    regions: Mapping[str, np.ndarray]

    def at(self, diffusion_time: float) -> "AbdominalScan":
        """The images of one diffusion time.

        Parameters
        ----------
        diffusion_time : float
            70 or 100 ms.

        Returns
        -------
        AbdominalScan
            The same slice with these measurements only, in the same order.

        Raises
        ------
        ValueError
            If the scan has no such diffusion time.
        """
        times = np.unique(self.diffusion_times)
        if diffusion_time not in times:
            raise ValueError(
                f"diffusion_time: {diffusion_time!r} ms was not measured; expected one of "
                f"{times.tolist()}"
            )
        return self._only(np.flatnonzero(self.diffusion_times == diffusion_time))

    def clinical(self, repeat: int, diffusion_time: float) -> "AbdominalScan":
        """One image per b-value: an acquisition of clinical length.

        Two repeats share no image, so their noise is independent. Within one
        repeat every image with b > 0 has the same gradient direction.

        Parameters
        ----------
        repeat : int
            Which one, from 0 to 5.
        diffusion_time : float
            70 or 100 ms.

        Returns
        -------
        AbdominalScan
            The same slice with one measurement per b-value, b ascending.

        Raises
        ------
        ValueError
            If the scan has no such repeat or no such diffusion time.
        """
        scan = self.at(diffusion_time)
        bvalues, counts = np.unique(scan.bvalues, return_counts=True)
        if repeat not in range(counts.min()):
            raise ValueError(
                f"repeat: {repeat!r} was not measured; expected an integer from 0 to "
                f"{counts.min() - 1}"
            )
        return scan._only(np.array([np.flatnonzero(scan.bvalues == b)[repeat] for b in bvalues]))

    def repeats(self, b: float) -> np.ndarray:
        """All images of one b-value.

        Parameters
        ----------
        b : float
            b-value, s/mm2.

        Returns
        -------
        (rows, columns, repeats)
            The images, in the order they were measured in.

        Raises
        ------
        ValueError
            If the scan has no such b-value.
        """
        if b not in self.bvalues:
            raise ValueError(
                f"b: {b!r} s/mm2 was not measured; expected one of "
                f"{np.unique(self.bvalues).tolist()}"
            )
        return self.images[..., self.bvalues == b]

    def _only(self, index: np.ndarray) -> "AbdominalScan":
        return replace(
            self,
            images=self.images[..., index],
            bvalues=self.bvalues[index],
            diffusion_times=self.diffusion_times[index],
        )


def load_abdomen(subject: str | int) -> AbdominalScan:
    """Abdominal IVIM images of one volunteer.

    The part of the public data that an IVIM model describes: bipolar diffusion
    gradients at diffusion times of 70 and 100 ms. For each time there are 24
    images at b = 0 and 6 (one per gradient direction) at each of b = 10, 25, 50,
    100, 200, 300, 400 and 500 s/mm2: 144 images in all.

    Parameters
    ----------
    subject : int or str
        Volunteer 1 to 6, as ``1`` or ``"1"`` or ``"volunteer1"``.

    Returns
    -------
    AbdominalScan
        With regions ``pancreas``, ``liver``, ``kidney`` and ``spleen``. Some hold
        few voxels (the kidney of volunteer 2 is a single one).

    Raises
    ------
    ValueError
        If there is no such volunteer.
    DataUnavailable, CorruptFile
        As `fetch` does.

    References
    ----------
    Wetscherek et al. 2015 {cite}`wetscherek2015ivim`.
    """
    number = str(subject).removeprefix("volunteer")
    if number not in {"1", "2", "3", "4", "5", "6"}:
        raise ValueError(f"subject: {subject!r} is no volunteer; expected 1, 2, 3, 4, 5 or 6")
    path = fetch(f"ivim-abdomen/volunteer{number}.mat")
    return _read_bipolar_arm(path, ("pancreas", "liver", "kidney", "spleen"))


def load_phantom(state: str) -> AbdominalScan:
    """The water phantom, measured with the volunteers' protocol.

    Parameters
    ----------
    state : {"static", "flow"}
        Whether the water in the pipe stands or flows.

    Returns
    -------
    AbdominalScan
        With regions ``bottle`` (no flow in either state: f = 0) and ``pipe``. The
        authors give no body mask: `mask` is True everywhere.

    Raises
    ------
    ValueError
        If `state` is neither of the two.
    DataUnavailable, CorruptFile
        As `fetch` does.

    References
    ----------
    Wetscherek et al. 2015 {cite}`wetscherek2015ivim`.
    """
    if state not in ("static", "flow"):
        raise ValueError(f"state: {state!r} is no phantom state; expected 'static' or 'flow'")
    return _read_bipolar_arm(fetch(f"ivim-abdomen/phantom_{state}.mat"), ("bottle", "pipe"))


def _read_bipolar_arm(path: Path, regions: tuple[str, ...]) -> AbdominalScan:
    file = scipy.io.loadmat(path, variable_names=["data", "b", "T", "betta", "mask", "rois"])
    # Unsigned 8- and 16-bit integers in the file: differences of them would wrap around.
    bvalues = file["b"].ravel().astype(float)
    times = file["T"].ravel().astype(float)
    # Every image without diffusion weighting is filed under the other gradient
    # profile (2, flow compensated): without gradients the profiles are the same.
    bipolar = (file["betta"].ravel() == 1) | (bvalues == 0)
    keep = np.flatnonzero(bipolar & np.isin(times, (70.0, 100.0)))
    images = np.moveaxis(file["data"][keep].astype(float), 0, -1)
    return AbdominalScan(
        images=np.ascontiguousarray(images),
        bvalues=bvalues[keep],
        diffusion_times=times[keep],
        mask=file["mask"] > 0.5,  # volunteer 1 marks part of the body with 0.996
        regions={name: file["rois"] == label for label, name in enumerate(regions, start=1)},
    )


@dataclass(frozen=True, eq=False)
class RelaxometryScan:
    """Six images of one brain slice that differ in one delay.

    Attributes
    ----------
    images : (rows, columns, 6) float64
        Signed images for T1 (the real part), magnitude images for T2.
    times_ms : (6,) float64
        Inversion times (T1) or echo times (T2), in milliseconds.
    repetition_time_ms : float
        Time between two excitations, in milliseconds.
    """

    images: np.ndarray
    times_ms: np.ndarray
    repetition_time_ms: float


def load_relaxometry(parameter: str) -> RelaxometryScan:
    """Brain images whose contrast follows T1 or T2.

    Parameters
    ----------
    parameter : {"t1", "t2"}
        ``"t1"``: inversion-recovery turbo spin echo, inversion times 50 to 4000 ms,
        repetition time 15 s. ``"t2"``: single-echo spin echo, echo times 10 to
        250 ms, repetition time 5 s.

    Returns
    -------
    RelaxometryScan
        Images (256, 192, 6), with times in milliseconds.

    Raises
    ------
    ValueError
        If `parameter` is neither of the two.
    DataUnavailable, CorruptFile
        As `fetch` does.
    """
    if parameter == "t1":
        times_ms, repetition_time_ms = (50, 100, 200, 500, 2000, 4000), 15_000.0
    elif parameter == "t2":
        times_ms, repetition_time_ms = (10, 25, 50, 90, 150, 250), 5_000.0
    else:
        raise ValueError(f"parameter: {parameter!r} is unknown; expected 't1' or 't2'")
    path = fetch(f"relaxometry-brain/{parameter}dataset.npy")
    return RelaxometryScan(
        images=np.load(path, allow_pickle=False).astype(float),
        times_ms=np.array(times_ms, dtype=float),
        repetition_time_ms=repetition_time_ms,
    )


@dataclass(frozen=True, eq=False)
class MTSlice:
    """One brain slice, measured with the magnetization-transfer fingerprint.

    Attributes
    ----------
    coefficients : (rows, columns, 13) complex128
        The fingerprint of each voxel in the published basis, in scanner units.
    mask : (rows, columns) bool
        The brain as the authors cut it out: everything else is exactly zero.
    """

    coefficients: np.ndarray
    mask: np.ndarray


def load_mt_slice() -> MTSlice:
    """The published brain slice: 13 complex coefficients in each voxel.

    Returns
    -------
    MTSlice
        175 rows, 215 columns.

    Raises
    ------
    DataUnavailable, CorruptFile
        As `fetch` does.

    References
    ----------
    Zhang et al. 2022 {cite}`zhang2022crb`.
    """
    file = scipy.io.loadmat(fetch("mt-brain/invivo_test_slice.mat"), variable_names=["x"])
    # All real parts first, then all imaginary parts.
    real, imaginary = np.split(file["x"].astype(float), 2, axis=-1)
    coefficients = real + 1j * imaginary
    return MTSlice(coefficients=coefficients, mask=np.any(coefficients != 0, axis=-1))


def load_mt_basis(rank: int = 13) -> tuple[np.ndarray, np.ndarray]:
    """The published low-rank basis of the magnetization-transfer fingerprint.

    Parameters
    ----------
    rank : int
        How many basis vectors, from 1 to 100; the brain slice has 13 coefficients.

    Returns
    -------
    basis : (1142, rank) complex128
        Orthonormal columns, the strongest first. Their imaginary parts are rounding errors.
    singular_values : (1142,)
        All of them, falling, in the unit of the authors' training set.

    Raises
    ------
    ValueError
        If `rank` is not a whole number from 1 to 100.
    DataUnavailable, CorruptFile
        As `fetch` does.

    References
    ----------
    Zhang et al. 2022 {cite}`zhang2022crb`.
    """
    if isinstance(rank, bool) or rank not in range(1, 101):
        raise ValueError(f"rank: {rank!r} is not published; expected an integer from 1 to 100")
    path = fetch("mt-brain/basis_for_compress.mat")
    file = scipy.io.loadmat(path, variable_names=["u", "s"])
    return np.ascontiguousarray(file["u"][:, : int(rank)]), file["s"].ravel()


def load_mt_pulses() -> tuple[np.ndarray, np.ndarray]:
    """The published pulse train of the magnetization-transfer fingerprint.

    Returns
    -------
    flip_angles : (1142,) float64
        In rad; the first is the inversion, pi.
    durations : (1142,) float64
        Lengths of the rectangular pulses, s.

    Raises
    ------
    DataUnavailable, CorruptFile
        As `fetch` does.

    References
    ----------
    Assländer et al. 2022 {cite}`asslander2022bloch`.
    """
    with h5py.File(fetch("mt-brain/control_MT_v3p2_TR3p5ms_discretized.mat"), "r") as file:
        return file["alpha"][...].ravel(), file["TRF"][...].ravel()
