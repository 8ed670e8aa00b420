"""Artefacts: what is read is what was written, and an interrupted study goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qmri import artefacts
from qmri.artefacts import (
    CorruptArtefact,
    Manifest,
    MissingArtefacts,
    Stages,
    Study,
    describe_files,
    folder,
    home,
    load_arrays,
    read_manifest,
    save_arrays,
    write_manifest,
)


def some_arrays():
    rng = np.random.default_rng(3)
    return {
        "weights": rng.normal(size=(4, 3, 2)).astype(np.float32),
        "bias": np.array([0.1, np.nan, -np.inf]),
        "counts": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "seconds": np.array(1.5),
        "mask": np.array([True, False]),
        "names": np.array(["f", "Dslow"]),
        "empty": np.zeros((0, 4)),
    }


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)


def files_in(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


# Array files


def test_arrays_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "arrays.npz"
    save_arrays(path, some_arrays())
    assert_same(load_arrays(path), some_arrays())
    with np.load(path) as file:
        np.testing.assert_array_equal(file["counts"], some_arrays()["counts"])
    assert files_in(tmp_path) == ["new/arrays.npz"]


def test_equal_arrays_give_equal_bytes(tmp_path, monkeypatch):
    """Whatever the time, and however the array lies in memory."""
    image = np.arange(12.0).reshape(3, 4)
    save_arrays(tmp_path / "a.npz", {"image": image})
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    save_arrays(tmp_path / "b.npz", {"image": np.asfortranarray(image)})
    save_arrays(tmp_path / "c.npz", {"image": image + 1})
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    "array",
    [
        np.array([{"a": 1}, None], dtype=object),
        np.zeros(2, dtype=[("x", float), ("y", object)]),
    ],
)
def test_python_objects_are_not_written(tmp_path, array):
    path = tmp_path / "arrays.npz"
    with pytest.raises(ValueError, match="'theta' has dtype .* expected numbers"):
        save_arrays(path, {"theta": array})
    assert files_in(tmp_path) == []


def test_python_objects_are_not_read(tmp_path, monkeypatch):
    """Not even from a file that is sound in every other way: to unpickle is to run code."""
    write_array = np.lib.format.write_array
    path = tmp_path / "arrays.npz"
    with monkeypatch.context() as forged:
        forged.setattr(artefacts, "_storable", lambda name, array: array)
        forged.setattr(
            np.lib.format, "write_array", lambda file, array, **_: write_array(file, array)
        )
        save_arrays(path, {"theta": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(CorruptArtefact, match="arrays.npz.*Object arrays"):
        load_arrays(path)


@pytest.mark.parametrize("name", ["", 3])
def test_names_of_arrays_are_text(tmp_path, name):
    with pytest.raises(ValueError, match="name"):
        save_arrays(tmp_path / "arrays.npz", {name: np.zeros(2)})


def test_every_truncated_file_is_refused(tmp_path):
    path = tmp_path / "arrays.npz"
    save_arrays(path, {"theta": np.linspace(0, 1, 50)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptArtefact, match="arrays.npz"):
            load_arrays(path)


def test_no_altered_byte_changes_a_number(tmp_path):
    """A changed byte is noticed, or is one that no number depends on (a date, say)."""
    path = tmp_path / "arrays.npz"
    arrays = {"theta": np.linspace(0, 1, 50), "sigma": np.array(0.05)}
    save_arrays(path, arrays)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= int(rng.integers(1, 256))
        path.write_bytes(altered)
        try:
            found = load_arrays(path)
        except CorruptArtefact as error:
            assert "arrays.npz" in str(error)
            refused += 1
        else:
            assert_same(found, arrays)
    assert refused > len(content) / 2


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        load_arrays(tmp_path / "nowhere.npz")


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "arrays.npz"
    save_arrays(path, {"theta": np.zeros(3)})
    old = path.read_bytes()
    write_member, written = zipfile.ZipFile.writestr, []

    def write_one_then_stop(*args):
        if written:
            raise KeyboardInterrupt
        written.append(write_member(*args))

    monkeypatch.setattr(zipfile.ZipFile, "writestr", write_one_then_stop)
    with pytest.raises(KeyboardInterrupt):
        save_arrays(path, {"first": np.ones(1000), "second": np.ones(1000)})
    assert len(written) == 1
    assert path.read_bytes() == old
    assert files_in(tmp_path) == ["arrays.npz"]


# The manifest


def manifest(**changes):
    entries = {
        "study": "training-labels",
        "scale": "quick",
        "command": "qmri study training-labels --scale quick",
        "seed": 3,
        "settings": {"snr": [15, 30], "restarts": 2, "name": "µm²/ms"},
        "stages": {"labels": 1.25, "training": 20.0},
        "results": {"slope": 0.36},
    }
    return Manifest(**{**entries, **changes})


def test_manifest_comes_back_as_it_was(tmp_path):
    written = manifest()
    write_manifest(tmp_path / "new", written)
    assert read_manifest(tmp_path / "new") == written
    assert files_in(tmp_path) == ["new/manifest.json"]


def test_manifest_says_with_what_it_was_made(tmp_path):
    write_manifest(tmp_path, manifest())
    content = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert content["versions"]["numpy"] == np.__version__
    assert content["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"qmri", "torch", "numba", "scipy"} <= set(content["versions"])
    assert content["machine"]["cores"] >= 1
    assert len(content["created"]) == len("2020-01-01")


def test_equal_manifests_give_equal_bytes(tmp_path):
    write_manifest(tmp_path / "a", manifest())
    write_manifest(tmp_path / "b", read_manifest(tmp_path / "a"))
    a, b = ((tmp_path / name / "manifest.json").read_bytes() for name in "ab")
    assert a == b


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    write_manifest(tmp_path, manifest(results={"slope": np.float32(0.5), "n": np.arange(3)}))
    assert read_manifest(tmp_path).results == {"slope": 0.5, "n": [0, 1, 2]}


@pytest.mark.parametrize("value", [np.nan, np.float64(np.inf), object(), {1, 2}])
def test_manifest_refuses_what_json_does_not_hold(tmp_path, value):
    write_manifest(tmp_path, manifest())
    old = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="manifest: expected"):
        write_manifest(tmp_path, manifest(results={"slope": value}))
    assert (tmp_path / "manifest.json").read_bytes() == old


@pytest.mark.parametrize("content", ["", "{", '{"study": "x"}', "[1]", "\xff"])
def test_damaged_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(CorruptArtefact, match="manifest.json"):
        read_manifest(tmp_path)


def test_described_files_have_the_checksum_of_their_bytes(tmp_path):
    (tmp_path / "b.npz").write_bytes(b"abc")
    (tmp_path / "a.npz").write_bytes(b"")
    described = describe_files(tmp_path, ["b.npz", "a.npz"])
    # The SHA-256 of "abc" is the example of the standard, FIPS 180-2.
    standard = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert list(described) == ["a.npz", "b.npz"]
    assert described["b.npz"] == {"sha256": standard, "bytes": 3}


# Reading a study


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Folder of a small study, where the library looks for it."""
    monkeypatch.setenv("QMRI_ARTEFACTS", str(tmp_path))
    path = tmp_path / "training-labels"
    save_arrays(path / "grid.npz", some_arrays())
    write_manifest(path, manifest(files=describe_files(path, ["grid.npz"])))
    return path


def test_study_gives_what_was_kept(study):
    opened = Study("training-labels")
    assert opened.folder == study == folder("training-labels")
    assert opened.scale == "quick"
    assert opened.label == "quick scale"
    assert opened.seed == 3
    assert opened.settings["restarts"] == 2
    assert opened.results == {"slope": 0.36}
    assert_same(opened.arrays("grid.npz"), some_arrays())
    assert "quick scale, seed 3, 1 files" in repr(opened)


def test_study_can_lie_elsewhere(study, tmp_path):
    elsewhere = study.rename(tmp_path / "mine")
    assert_same(Study("training-labels", elsewhere).arrays("grid.npz"), some_arrays())


@pytest.mark.parametrize("location", [None, "elsewhere"])
def test_missing_results_name_the_command_that_makes_them(tmp_path, monkeypatch, location):
    monkeypatch.setenv("QMRI_ARTEFACTS", str(tmp_path))
    location = location and tmp_path / location
    with pytest.raises(MissingArtefacts, match="`qmri study training-labels --scale quick`") as e:
        Study("training-labels", location)
    assert str(tmp_path) in str(e.value)
    assert e.value._render_traceback_() == [f"MissingArtefacts: {e.value}"]


def test_missing_file_of_a_study_names_the_command_too(study):
    (study / "grid.npz").unlink()
    with pytest.raises(MissingArtefacts, match="grid.npz.*qmri study training-labels"):
        Study("training-labels").arrays("grid.npz")


def test_file_that_another_run_wrote_is_refused(study):
    """A sound file, but not the one that the manifest describes."""
    opened = Study("training-labels")
    opened.arrays("grid.npz")
    save_arrays(study / "grid.npz", {"weights": np.zeros(2)})
    found = hashlib.sha256((study / "grid.npz").read_bytes()).hexdigest()
    listed = opened.manifest.files["grid.npz"]["sha256"]
    with pytest.raises(CorruptArtefact, match=f"SHA-256 is {found}.*manifest says {listed}") as e:
        opened.arrays("grid.npz")
    assert str(study / "grid.npz") in str(e.value)


def test_truncated_file_of_a_study_is_refused(study):
    content = (study / "grid.npz").read_bytes()
    (study / "grid.npz").write_bytes(content[:-1])
    with pytest.raises(CorruptArtefact, match=r"grid.npz is cut short.*SHA-256.*manifest"):
        Study("training-labels").arrays("grid.npz")


def test_file_that_is_not_of_the_study_is_refused(study):
    with pytest.raises(ValueError, match=r"'girds.npz'; expected one of grid.npz"):
        Study("training-labels").arrays("girds.npz")


def test_artefacts_lie_in_the_project(root, monkeypatch):
    monkeypatch.delenv("QMRI_ARTEFACTS", raising=False)
    assert home() == root / "data"


def test_library_outside_a_checkout_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.delenv("QMRI_ARTEFACTS", raising=False)
    monkeypatch.setattr(artefacts, "__file__", str(tmp_path / "lib" / "qmri" / "artefacts.py"))
    with pytest.raises(MissingArtefacts, match="set QMRI_ARTEFACTS"):
        Study("training-labels")


# Stages

SETTINGS = {"scale": "quick", "seed": 0, "networks": {"restarts": 4, "widths": [9, 150]}}


class Computation:
    """A stage that counts how often it is computed."""

    def __init__(self, value=1.0):
        self.value = value
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"theta": np.full(3, self.value)}


def test_finished_stage_is_not_computed_again(tmp_path):
    compute = Computation()
    first = Stages(tmp_path / "work", SETTINGS)
    computed = first.run("labels", compute)
    again = Stages(tmp_path / "work", json.loads(json.dumps(SETTINGS)))
    assert_same(again.run("labels", compute), computed)
    assert compute.calls == 1
    assert again.seconds == pytest.approx(first.seconds, abs=0.001)


def test_result_is_the_same_before_and_after_it_was_stored(tmp_path):
    """Types too: a stage may return plain numbers."""
    stages = Stages(tmp_path, SETTINGS)
    computed = stages.run("numbers", lambda: {"count": 3, "values": [1.0, 2.0]})
    assert_same(stages.run("numbers", Computation()), computed)
    assert computed["count"].shape == ()


def test_settings_may_hold_tuples_and_numpy_numbers(tmp_path):
    Stages(tmp_path, {"snr": (15, 30), "sigma": np.float64(0.1)})
    Stages(tmp_path, {"sigma": 0.1, "snr": [15, 30]})
    assert files_in(tmp_path) == ["qmri-stages.json"]


def test_failed_stage_is_computed_again_and_others_are_not(tmp_path):
    first, second = Computation(), Computation(2.0)
    stages = Stages(tmp_path, SETTINGS)
    stages.run("labels", first)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("training", interrupted)
    assert list(stages.seconds) == ["labels"]
    resumed = Stages(tmp_path, SETTINGS)
    resumed.run("labels", first)
    np.testing.assert_array_equal(resumed.run("training", second)["theta"], np.full(3, 2.0))
    assert (first.calls, second.calls) == (1, 1)
    assert list(resumed.seconds) == ["labels", "training"]


KILLED = """
import os, signal, sys
import numpy as np
from qmri.artefacts import Stages, save_arrays

stages = Stages(sys.argv[1], {"seed": 0})
stages.run("labels", lambda: {"theta": np.zeros(3)})

def killed():
    save_arrays(stages.path("training"), {"epoch": np.array(7)})
    os.kill(os.getpid(), signal.SIGKILL)

stages.run("training", killed)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_stage_is_computed_again_from_its_checkpoint(tmp_path):
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert process.returncode == -signal.SIGKILL
    stages = Stages(tmp_path, {"seed": 0})
    labels = Computation()
    stages.run("labels", labels)
    assert labels.calls == 0
    resumed = stages.run("training", lambda: load_arrays(stages.path("training")))
    assert resumed["epoch"] == 7
    assert not stages.path("training").exists()


@pytest.mark.parametrize("kept", ["{}", "{}.0.npz"], ids=["one file", "one of several"])
def test_time_before_an_error_counts_if_the_stage_goes_on_from_a_checkpoint(
    tmp_path, monkeypatch, kept
):
    clock = iter([0.0, 30.0, 100.0, 112.0, 200.0, 205.0])
    monkeypatch.setattr(artefacts.time, "perf_counter", lambda: next(clock))
    stages = Stages(tmp_path, SETTINGS)

    def half():
        save_arrays(kept.format(stages.path("training")), {"epoch": np.array(7)})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("training", half)
    stages.run("training", Computation())
    stages.run("evaluation", Computation())
    assert stages.seconds == {"training": 42.0, "evaluation": 5.0}


def test_time_of_an_attempt_that_left_nothing_does_not_count(tmp_path, monkeypatch):
    clock = iter([0.0, 30.0, 100.0, 112.0])
    monkeypatch.setattr(artefacts.time, "perf_counter", lambda: next(clock))
    stages = Stages(tmp_path, SETTINGS)
    with pytest.raises(ZeroDivisionError):
        stages.run("labels", lambda: 1 / 0)
    stages.run("labels", Computation())
    assert stages.seconds == {"labels": 12.0}


@pytest.mark.parametrize("damage", [b"", b"PK"])
def test_damaged_stage_is_computed_again_and_said(tmp_path, caplog, damage):
    compute = Computation()
    stages = Stages(tmp_path, SETTINGS)
    stages.run("labels", compute)
    (tmp_path / "labels.npz").write_bytes(damage)
    stages.run("labels", compute)
    assert compute.calls == 2
    assert "labels: computed again" in caplog.text
    assert_same(load_arrays(tmp_path / "labels.npz"), {"theta": np.full(3, 1.0)})


def test_one_line_is_logged_for_each_stage(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="qmri")
    stages = Stages(tmp_path, SETTINGS)
    stages.run("labels", Computation())
    stages.run("labels", Computation())
    computed, read = caplog.messages
    assert computed.startswith("labels: ")
    assert read.startswith("labels: finished before")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({**SETTINGS, "seed": 1}, "seed is 0 there and 1 now"),
        (
            {**SETTINGS, "networks": {"restarts": 16, "widths": [9, 150]}},
            "networks.restarts is 4 there and 16 now",
        ),
        ({"scale": "quick", "seed": 0}, "networks.restarts is 4 there and absent now"),
        ({**SETTINGS, "alpha": 0.5}, "alpha is absent there and 0.5 now"),
    ],
)
def test_stages_of_other_settings_are_refused(tmp_path, other, named):
    stages = Stages(tmp_path, SETTINGS)
    stages.run("labels", Computation())
    with pytest.raises(ValueError, match=named) as refusal:
        Stages(tmp_path, other)
    assert "--fresh" in str(refusal.value)
    assert "scale" not in str(refusal.value)  # what is the same is not listed
    compute = Computation()
    Stages(tmp_path, SETTINGS).run("labels", compute)
    assert compute.calls == 0


def test_fresh_starts_anew(tmp_path):
    stages = Stages(tmp_path, SETTINGS)
    stages.run("labels", Computation())
    save_arrays(stages.path("training"), {"epoch": np.array(7)})
    compute = Computation(2.0)
    anew = Stages.fresh(tmp_path, {**SETTINGS, "seed": 1})
    assert not anew.path("training").exists()
    assert anew.run("labels", compute)["theta"][0] == 2.0
    assert compute.calls == 1
    with pytest.raises(ValueError, match="seed is 1 there"):
        Stages(tmp_path, SETTINGS)


def test_fresh_needs_nothing_to_start_from(tmp_path):
    compute = Computation()
    Stages.fresh(tmp_path / "new", SETTINGS).run("labels", compute)
    assert compute.calls == 1


@pytest.mark.parametrize("start", [Stages, Stages.fresh])
def test_folder_of_something_else_is_left_alone(tmp_path, start):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"thesis.txt.*expected an empty folder"):
        start(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        start(tmp_path / "thesis.txt", SETTINGS)
    assert files_in(tmp_path) == ["thesis.txt"]


def test_altered_settings_are_refused_until_started_anew(tmp_path):
    Stages(tmp_path, SETTINGS)
    (tmp_path / "qmri-stages.json").write_text("{", encoding="utf-8")
    with pytest.raises(CorruptArtefact, match=r"qmri-stages.json.*--fresh"):
        Stages(tmp_path, SETTINGS)
    Stages.fresh(tmp_path, SETTINGS)
    Stages(tmp_path, SETTINGS)


@pytest.mark.parametrize("name", ["", "../labels", "snr15/labels", ".hidden", "a b"])
def test_names_of_stages_are_file_names(tmp_path, name):
    stages = Stages(tmp_path / "work", SETTINGS)
    for use in (stages.path, lambda name: stages.run(name, Computation())):
        with pytest.raises(ValueError, match="cannot be a file name"):
            use(name)
    assert files_in(tmp_path) == ["work/qmri-stages.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_files_can_be_read_by_others_as_the_user_allows(tmp_path):
    """A temporary file is private by default; what takes its place must not stay so."""
    plain = Path(tmp_path, "plain")
    plain.touch()
    save_arrays(tmp_path / "arrays.npz", some_arrays())
    assert (tmp_path / "arrays.npz").stat().st_mode == plain.stat().st_mode
