"""What is true of every study in `data/`; each study's own tests say what its files hold."""

from __future__ import annotations

import shlex

import pytest

from qmri import artefacts, cli
from qmri.artefacts import Study, StudyResults

LIMITS = {  # bytes of all files
    "training-labels": 5_000_000,
    "training-labels-abdomen": 5_000_000,
    "abdomen": 4_000_000,
    "crb-loss": 15_000_000,
    "brain": 8_000_000,
}


@pytest.fixture(params=sorted(LIMITS))
def stored(request, root, monkeypatch) -> Study:
    monkeypatch.delenv("QMRI_ARTEFACTS", raising=False)
    return Study(request.param, root / "data" / request.param)


def test_every_stored_study_is_looked_at(root):
    assert {path.parent.name for path in root.glob("data/*/manifest.json")} == set(LIMITS)


def test_files_are_those_that_the_manifest_lists(stored, check_listed):
    check_listed(stored.folder, stored.manifest.files)


def test_files_hold_plain_arrays(stored):
    results = StudyResults(stored.name, stored.folder)
    for name in stored.manifest.files:
        arrays = results.arrays(name.removesuffix(".npz"))  # compares the checksum
        assert arrays
        assert not any(values.dtype.hasobject for values in arrays.values())
        assert results.arrays(name.removesuffix(".npz")) is arrays  # read once


def test_files_are_small(stored):
    sizes = [path.stat().st_size for path in stored.folder.iterdir()]
    assert sum(sizes) < LIMITS[stored.name]
    assert max(sizes) < 4_000_000


def test_its_command_can_be_typed(stored):
    manifest = stored.manifest
    options = cli._parser().parse_args(shlex.split(manifest.command)[1:])
    protocol = manifest.settings.get("protocol")
    assert (options.scale, options.seed) == (manifest.scale, manifest.seed)
    assert getattr(options, "protocol", None) == protocol
    name = options.study
    if protocol not in (None, "paper", "published"):
        name += f"-{protocol}"
    assert name == manifest.study == stored.name


def test_what_it_took_is_known(stored):
    assert stored.manifest.stages
    assert all(seconds >= 0 for seconds in stored.manifest.stages.values())


def test_a_name_tells_study_and_protocol():
    protocols = ("paper", "abdomen")
    assert artefacts.study_name("training-labels", "paper", protocols) == "training-labels"
    found = artefacts.study_name("training-labels", "abdomen", protocols)
    assert found == "training-labels-abdomen"
    command = "qmri study training-labels --scale quick --protocol abdomen"
    assert artefacts._command(found, "quick") == command
    with pytest.raises(ValueError, match="protocol must be one of paper, abdomen, got 'knee'"):
        artefacts.study_name("training-labels", "knee", protocols)
