"""What ``data/`` holds: results of studies, kept as small files that are checked when read.

A study leaves one folder: array files without pickle, and ``manifest.json``, which says how
they were made and lists the SHA-256 of each. `Study` opens such a folder; `Stages` lets a
long study go on where it was interrupted.
"""

import hashlib
import importlib.metadata
import io
import json
import logging
import lzma
import os
import platform
import re
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

import qmri
from qmri._choices import check_choice

__all__ = [
    "CorruptArtefact",
    "Manifest",
    "MissingArtefacts",
    "Stages",
    "Study",
    "StudyResults",
    "carry_out",
    "describe_files",
    "folder",
    "home",
    "load_arrays",
    "read_manifest",
    "save_arrays",
    "study_name",
    "with_prefix",
    "write_manifest",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WORK = "qmri-stages.json"  # marks a work folder, and holds the settings it belongs to


class MissingArtefacts(FileNotFoundError):
    """The results of a study are not on this computer.

    The message is one sentence that names the command which makes them. A notebook
    shows that sentence alone instead of a traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class CorruptArtefact(ValueError):
    """A file was cut short or altered since it was written; the message names it."""


# Where artefacts are


def home() -> Path:
    """The folder that holds one folder per study; it need not exist.

    Returns
    -------
    pathlib.Path
        ``data`` of the project, or the folder that the environment variable
        ``QMRI_ARTEFACTS`` names.

    Raises
    ------
    MissingArtefacts
        If the variable is not set and the library was not installed from a checkout
        of the project (``pip install -e .``).
    """
    replacement = os.environ.get("QMRI_ARTEFACTS")
    if replacement:
        return Path(replacement).expanduser()
    project = Path(__file__).parents[2]
    if not (project / "pyproject.toml").is_file():
        raise MissingArtefacts(
            f"qmri in {Path(__file__).parent} is not part of a checkout of the project and has no "
            "artefacts of its own: set QMRI_ARTEFACTS to a folder that holds them or will"
        )
    return project / "data"


def folder(study: str) -> Path:
    """The folder with the results of a study.

    Parameters
    ----------
    study : str
        Name of the study, for example ``"training-labels"``.

    Returns
    -------
    pathlib.Path
        A folder that holds a manifest.

    Raises
    ------
    MissingArtefacts
        If there is none; the message names the command that makes it.
    """
    path = home() / study
    if not (path / MANIFEST).is_file():
        raise MissingArtefacts(f"{path} holds no results of this study: {_how_to_make(study)}")
    return path


def _how_to_make(study: str) -> str:
    command = _command(study, "quick")
    return f"run `{command}`, or the same with --scale paper for the paper's numbers"


def _command(study: str, scale: str) -> str:
    """What to type to make a study; its name tells the protocol, see `study_name`."""
    protocol = ""
    for name in ("abdomen", "default"):
        if study.endswith(f"-{name}"):
            study, protocol = study.removesuffix(f"-{name}"), f" --protocol {name}"
    return f"qmri study {study} --scale {scale}{protocol}"


# Array files


def save_arrays(path: str | Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Write named arrays to one compressed ``.npz`` file.

    The file is replaced as a whole: whoever reads it finds the old content or the
    new, and an interrupted write leaves the old. Equal arrays give equal bytes (with
    the same zlib), so that a checksum says whether a result was reproduced.

    Parameters
    ----------
    path : path
        File to write; its folder is made if it does not exist.
    arrays : mapping of str to array
        Any shapes; numbers, booleans or text. `numpy.load` reads them too.

    Raises
    ------
    ValueError
        If an array holds Python objects, which only pickle could store, or if a
        name is not a non-empty text.
    """
    members = {f"{name}.npy": _npy(_storable(name, array)) for name, array in arrays.items()}
    with _replacing(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            # Nothing that changes from day to day or from system to system.
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
        archive.comment = _digest(members)


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=False)
    return content.getvalue()


def _digest(members: Mapping[str, bytes]) -> bytes:
    """One checksum of all arrays: those of a zip file do not notice an array that is lost."""
    digest = hashlib.sha256()
    for name, content in members.items():
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest().encode()


def _storable(name: str, array: ArrayLike) -> np.ndarray:
    if not (isinstance(name, str) and name):
        raise ValueError(f"arrays: the name {name!r} is no text, expected a non-empty one")
    array = np.asarray(array, order="C")  # the bytes must not depend on the memory layout
    if array.dtype.hasobject:
        raise ValueError(
            f"arrays: {name!r} has dtype {array.dtype}, expected numbers, booleans or text: "
            "Python objects are not stored"
        )
    return array


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read what `save_arrays` wrote.

    Parameters
    ----------
    path : path
        An ``.npz`` file.

    Returns
    -------
    dict of str to array
        In the order they were saved in.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    CorruptArtefact
        If it is cut short, altered, not written by `save_arrays`, or holds Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    return _arrays(path.read_bytes(), path)


# What zipfile, its decompressors and NumPy raise for bytes that are not what was written.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


def _arrays(content: bytes, path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
            if archive.comment != _digest(members):
                raise ValueError("it does not hold the arrays that were saved")
        return {
            name.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(member), allow_pickle=False
            )
            for name, member in members.items()
        }
    except _UNREADABLE as error:
        raise CorruptArtefact(
            f"{path} is cut short or altered ({len(content)} bytes): {error}"
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# The manifest


def _versions() -> dict[str, str]:
    packages = ("numpy", "scipy", "numba", "torch")
    return {
        "python": platform.python_version(),
        "qmri": qmri.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _machine() -> dict[str, str | int]:
    usable = getattr(os, "sched_getaffinity", None)  # not on every system
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": len(usable(0)) if usable else os.cpu_count() or 1,
    }


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """How the files of a study were made.

    All of it is text, finite numbers, lists and dictionaries with text keys.

    Attributes
    ----------
    study : str
        Name of the study, as ``qmri study`` takes it.
    scale : str
        ``"quick"`` or ``"paper"``.
    command : str
        What to type to make the files again.
    seed : int
        Where the random numbers start.
    settings : dict
        All that the numbers depend on.
    versions, machine : dict
        Libraries and computer; by default, those in use now.
    created : str
        Date in UTC, ``YYYY-MM-DD``; today by default.
    stages : dict of str to float
        Wall time of each stage, in seconds.
    files : dict of str to dict
        ``sha256`` and ``bytes`` of each file, as `describe_files` gives them.
    results : dict
        The study's few most important numbers.
    """

    study: str
    scale: str
    command: str
    seed: int
    settings: dict
    versions: dict = field(default_factory=_versions)
    machine: dict = field(default_factory=_machine)
    created: str = field(default_factory=_today)
    stages: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)


def with_prefix(arrays: Mapping, prefix: str) -> dict:
    """Those arrays whose name begins with `prefix`, under the rest of their name."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def describe_files(folder: str | Path, names: Iterable[str]) -> dict[str, dict]:
    """Checksum and size of files, for a manifest.

    Parameters
    ----------
    folder : path
    names : iterable of str
        File names in that folder.

    Returns
    -------
    dict of str to dict
        ``{"sha256": 64 hexadecimal digits, "bytes": int}`` for each name, sorted.

    Raises
    ------
    FileNotFoundError
        If one of the files does not exist.
    """
    contents = {name: Path(folder, name).read_bytes() for name in sorted(names)}
    return {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, as a whole or not at all.

    Parameters
    ----------
    folder : path
        It is made if it does not exist.
    manifest : Manifest

    Raises
    ------
    ValueError
        If the manifest holds something that JSON does not, such as NaN.
    """
    content = _json("manifest", asdict(manifest))
    with _replacing(Path(folder, MANIFEST)) as file:
        file.write(content)


def read_manifest(folder: str | Path) -> Manifest:
    """Read what `write_manifest` wrote.

    Parameters
    ----------
    folder : path

    Returns
    -------
    Manifest

    Raises
    ------
    FileNotFoundError
        If the folder has no manifest.
    CorruptArtefact
        If the manifest is not JSON or lacks an entry.
    """
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise FileNotFoundError(f"folder: there is no file {path}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptArtefact(f"{path} is cut short or altered: {error}") from error
    expected = {entry.name for entry in fields(Manifest)}
    if not isinstance(content, dict) or set(content) != expected:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise CorruptArtefact(f"{path} holds {found}, expected the entries {sorted(expected)}")
    return Manifest(**content)


def _json(argument: str, value: object) -> bytes:
    try:
        text = json.dumps(
            value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain_number
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{argument}: expected text, finite numbers, lists and dictionaries only: {error}"
        ) from error
    return f"{text}\n".encode()


def _plain_number(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"got {value!r}, a {type(value).__name__}")


# Reading a study


class Study:
    """The results of a study, opened for reading.

    Parameters
    ----------
    name : str
        Name of the study, for example ``"training-labels"``.
    location : path, optional
        Its folder; `folder(name)` by default.

    Attributes
    ----------
    name : str
    folder : pathlib.Path
    manifest : Manifest

    Raises
    ------
    MissingArtefacts
        If the folder has no manifest; the message names the command that makes it.
    CorruptArtefact
        If the manifest cannot be read.
    """

    def __init__(self, name: str, location: str | Path | None = None) -> None:
        self.name = name
        self.folder = folder(name) if location is None else Path(location)
        try:
            self.manifest = read_manifest(self.folder)
        except FileNotFoundError as error:
            raise MissingArtefacts(f"{error}: {_how_to_make(name)}") from error

    @property
    def scale(self) -> str:
        """``"quick"`` or ``"paper"``."""
        return self.manifest.scale

    @property
    def label(self) -> str:
        """The scale as figures state it: ``"quick scale"`` or ``"paper scale"``."""
        return f"{self.scale} scale"

    @property
    def seed(self) -> int:
        """Where the random numbers of the study start."""
        return self.manifest.seed

    @property
    def settings(self) -> dict:
        """All that the numbers depend on."""
        return self.manifest.settings

    @property
    def results(self) -> dict:
        """The study's few most important numbers."""
        return self.manifest.results

    def arrays(self, file: str) -> dict[str, np.ndarray]:
        """Arrays of one file, after its checksum is compared with the manifest's.

        Parameters
        ----------
        file : str
            A name that the manifest lists.

        Returns
        -------
        dict of str to array

        Raises
        ------
        ValueError
            If the manifest does not list the file; the message says what it lists.
        MissingArtefacts
            If the file is listed and not there.
        CorruptArtefact
            If the SHA-256 of the file is not the one in the manifest.
        """
        listed = self.manifest.files
        if file not in listed:
            raise ValueError(
                f"file: the study {self.name} has no {file!r}; expected one of "
                f"{', '.join(listed) or 'none'}"
            )
        path = self.folder / file
        if not path.is_file():
            raise MissingArtefacts(f"there is no file {path}: {_how_to_make(self.name)}")
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != listed[file]["sha256"]:
            raise CorruptArtefact(
                f"{path} is cut short or altered: its SHA-256 is {found} ({len(content)} bytes), "
                f"but the manifest says {listed[file]['sha256']} ({listed[file]['bytes']} bytes)"
            )
        return _arrays(content, path)

    def __repr__(self) -> str:
        return (
            f"<Study {self.name}: {self.label}, seed {self.seed}, "
            f"{len(self.manifest.files)} files, {self.manifest.created}>"
        )


class StudyResults:
    """What a run of a study has left; each study has one that knows what its files mean.

    Parameters
    ----------
    name : str
        Name of the study.
    location : path, optional
        Folder of the results; by default the one that the book reads.

    Attributes
    ----------
    study : Study

    Raises
    ------
    MissingArtefacts
        If the study has not been run; the message names the command.
    """

    def __init__(self, name: str, location: str | Path | None = None) -> None:
        self.study = Study(name, location)
        self._files: dict[str, dict[str, np.ndarray]] = {}

    def __repr__(self) -> str:
        return f"<Results {self.study!r}>"

    @property
    def label(self) -> str:
        """The scale, as figures state it: "paper scale" or "quick scale"."""
        return self.study.label

    def arrays(self, file: str) -> dict[str, np.ndarray]:
        """One file of the study, by its name without ``.npz``; kept once read."""
        if file not in self._files:
            self._files[file] = self.study.arrays(f"{file}.npz")
        return self._files[file]


# Writing a study


class Stages:
    """Named stages of a long computation, each kept on disk once it is finished.

    A computation that was interrupted runs its stages again from the first: those
    that were finished are read instead of computed. A stage may keep a checkpoint
    of its own at `path`; it is removed when the stage is finished.

    Parameters
    ----------
    work : path
        Folder for the stages; made if it does not exist.
    settings : mapping
        All that the results depend on: text, finite numbers, lists, dictionaries.

    Raises
    ------
    ValueError
        If `work` holds stages of other settings (the message says what differs),
        or files that no computation of this kind has written.
    """

    def __init__(self, work: str | Path, settings: Mapping) -> None:
        self.work = Path(work)
        self._seconds: dict[str, float] = {}
        _refuse_foreign(self.work)
        marker = self.work / WORK
        content = _json("settings", dict(settings))
        if marker.exists():
            _refuse_other_settings(marker, json.loads(content))
        else:
            with _replacing(marker) as file:
                file.write(content)

    @classmethod
    def fresh(cls, work: str | Path, settings: Mapping) -> "Stages":
        """Like ``Stages(work, settings)``, after everything in `work` is removed."""
        work = Path(work)
        _refuse_foreign(work)
        if work.exists():
            for entry in work.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != WORK:
                    entry.unlink()
            # The mark goes last: removal that is interrupted can be repeated.
            (work / WORK).unlink(missing_ok=True)
        return cls(work, settings)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each stage run so far, in that order, in seconds.

        A finished stage keeps the time it took when it was computed. For a stage
        that went on from its checkpoint, the time before an error or Ctrl-C counts
        too; the time before a kill does not.
        """
        return dict(self._seconds)

    def path(self, name: str) -> Path:
        """Where a stage may keep its own checkpoint while it runs; its folder exists."""
        checkpoints = self.work / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        return checkpoints / f"{_checked_stage(name)}.npz"

    def run(
        self, name: str, compute: Callable[[], Mapping[str, ArrayLike]]
    ) -> dict[str, np.ndarray]:
        """Result of one stage: read if it is finished, otherwise computed and kept.

        Parameters
        ----------
        name : str
            Letters, digits, ``_``, ``.``, ``+`` and ``-``.
        compute : callable
            Returns named arrays (see `save_arrays`).

        Returns
        -------
        dict of str to array
            What the stage's file holds, whether it was computed now or earlier.

        Raises
        ------
        ValueError
            If `name` cannot be a file name, or an array holds Python objects.
        """
        file = self.work / f"{_checked_stage(name)}.npz"
        seconds, finished = self._read_time(name)
        if finished:
            try:
                arrays = load_arrays(file)
            except (CorruptArtefact, FileNotFoundError) as error:
                logger.warning("%s: computed again, because %s", name, error)
            else:
                self._seconds[name] = seconds
                logger.info("%s: finished before, in %.1f s", name, seconds)
                return arrays
        checkpoint = self.path(name)
        # Work that is done in parallel keeps several files, named after this one.
        begun = any(checkpoint.parent.glob(f"{checkpoint.name}*"))
        spent = seconds if begun and not finished else 0.0
        start = time.perf_counter()
        try:
            save_arrays(file, compute())
        except BaseException:
            self._write_time(name, spent + time.perf_counter() - start, finished=False)
            raise
        seconds = spent + time.perf_counter() - start
        self._write_time(name, seconds, finished=True)
        checkpoint.unlink(missing_ok=True)
        self._seconds[name] = seconds
        logger.info("%s: %.1f s", name, seconds)
        return load_arrays(file)

    def _read_time(self, name: str) -> tuple[float, bool]:
        try:
            kept = json.loads((self.work / f"{name}.seconds").read_bytes())
            return float(kept["seconds"]), bool(kept["finished"])
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return 0.0, False

    def _write_time(self, name: str, seconds: float, finished: bool) -> None:
        with _replacing(self.work / f"{name}.seconds") as file:
            file.write(_json("seconds", {"seconds": round(seconds, 3), "finished": finished}))


def study_name(study: str, protocol: str, protocols: Iterable[str]) -> str:
    """Name of a study of one protocol, which is also that of its folder.

    Parameters
    ----------
    study : str
        As ``qmri study`` takes it.
    protocol : str
    protocols : iterable of str
        Those there are; the first is what the study is about, and not named.

    Raises
    ------
    ValueError
        If there is no such protocol.
    """
    first, *others = protocols
    check_choice("protocol", protocol, (first, *others))
    return study if protocol == first else f"{study}-{protocol}"


def carry_out(
    study: str,
    compute: Callable[[Stages], tuple[Mapping[str, Mapping], Mapping]],
    settings: Mapping,
    *,
    scale: str,
    seed: int,
    protocol: str | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
) -> Path:
    """Compute a study, or go on with one that was interrupted, and keep what it leaves.

    Parameters
    ----------
    study : str
        Its name, which is also that of its folder, as `study_name` gives it.
    compute : callable
        Gets the stages, returns arrays by file name, and results for the manifest.
    settings : mapping
        All that the results depend on, but for what follows.
    scale : str
    seed : int
    protocol : str, optional
        Of a study that has several.
    out : path, optional
        Folder for the results; by default the one that the book reads.
    fresh : bool
        Forget what an earlier run has finished.

    Returns
    -------
    pathlib.Path
        The folder; stages are kept beside it, in ``.work``.

    Raises
    ------
    ValueError
        If the work folder holds another run's stages.
    """
    target = home() / study if out is None else Path(out)
    work = target.parent / ".work" / f"{target.name}-{scale}"
    named = {"scale": scale} if protocol is None else {"scale": scale, "protocol": protocol}
    settings = {**named, "seed": seed, **settings}
    stages = (Stages.fresh if fresh else Stages)(work, settings)
    files, results = compute(stages)
    for file, arrays in files.items():
        save_arrays(target / file, arrays)
    command = _command(study, scale) + ("" if seed == 0 else f" --seed {seed}")
    manifest = Manifest(
        study=study, scale=scale, command=command, seed=seed, settings=settings,
        stages=stages.seconds, files=describe_files(target, files), results=dict(results),
    )  # fmt: skip
    write_manifest(target, manifest)
    logger.info("%s: %.0f s in all", target, sum(stages.seconds.values()))
    return target


def _checked_stage(name: str) -> str:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"name: {name!r} cannot be a file name, expected letters, digits, _.+-")
    return name


def _refuse_foreign(work: Path) -> None:
    if work.exists() and not work.is_dir():
        raise ValueError(f"work: {work} is a file, expected a folder")
    if not work.exists() or (work / WORK).exists():
        return
    foreign = sorted(entry.name for entry in work.iterdir() if not entry.name.startswith("."))
    if foreign:
        raise ValueError(
            f"work: {work} holds {', '.join(foreign[:3])} and no {WORK}, expected an empty "
            "folder or one that an interrupted study left"
        )


def _refuse_other_settings(marker: Path, asked: dict) -> None:
    try:
        kept = json.loads(marker.read_bytes())
    except ValueError as error:
        raise CorruptArtefact(f"{marker} is altered: start anew with --fresh") from error
    kept, asked = _flat(kept), _flat(asked)
    names = [name for name in {**kept, **asked} if kept.get(name) != asked.get(name)]
    if names:
        differences = "; ".join(
            f"{name} is {kept.get(name, 'absent')} there and {asked.get(name, 'absent')} now"
            for name in names
        )
        raise ValueError(
            f"settings: {marker.parent} holds stages of another run: {differences}. "
            "Ask for the same again to go on with it, or start anew with --fresh"
        )


def _flat(settings: object, prefix: str = "") -> dict[str, str]:
    """One line per setting, nested names joined by dots, so that differences can be named."""
    if isinstance(settings, dict) and (settings or not prefix):
        parts = (
            _flat(value, f"{prefix}.{name}" if prefix else name) for name, value in settings.items()
        )
        return {name: text for part in parts for name, text in part.items()}
    return {prefix: json.dumps(settings, ensure_ascii=False)}
