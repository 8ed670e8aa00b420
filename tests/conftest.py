"""What the tests share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from qmri.artefacts import read_manifest


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def check_listed() -> Callable[[Path, Iterable[str]], None]:
    """That a folder holds some files and a manifest that describes each of them."""

    def check(folder: Path, files: Iterable[str]) -> None:
        manifest = read_manifest(folder)
        assert set(manifest.files) == set(files)
        assert {path.name for path in folder.iterdir()} == {*files, "manifest.json"}
        for name, entry in manifest.files.items():
            content = (folder / name).read_bytes()
            assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}

    return check
