"""Skip the notebooks whose public data is neither here nor within reach, by name."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest


@functools.cache
def missing(name: str) -> str:
    """Return why a public file cannot be read, in one sentence, or "" if it can."""
    from qmri.sources import DataUnavailable, fetch

    try:
        fetch(name)
    except DataUnavailable as error:
        return str(error)
    return ""


@functools.cache
def missing_data(notebook: Path) -> str:
    """Return why a notebook cannot run, or "": its metadata ``qmri.data`` lists what it reads."""
    metadata = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
    names = metadata.get("qmri", {}).get("data", [])
    return next((reason for name in names if (reason := missing(name))), "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every cell of such a notebook as skipped; no kernel is started for it."""
    for item in items:
        if item.path.suffix == ".ipynb" and (reason := missing_data(item.path)):
            item.add_marker(pytest.mark.skip(reason=reason))
