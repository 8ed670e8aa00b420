"""The command qmri: what it runs, what it says, and how it ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType, ModuleType

import pytest

import qmri
from qmri import cli, sources
from qmri.artefacts import CorruptArtefact, Study
from qmri.sources import SOURCES, CorruptFile, DataUnavailable

NAME = "ivim-abdomen/volunteer1.mat"
STUDY = ["study", "training-labels", "--scale", "quick"]


@pytest.fixture
def study(monkeypatch):
    """A study that keeps what it was called with; `does` is what it does."""
    return stand_in(monkeypatch, "training_labels")


def stand_in(monkeypatch, name):
    module = ModuleType(f"qmri.studies.{name}")
    module.calls = []
    module.does = lambda: None

    def run(**options):
        module.calls.append(options)
        module.does()

    module.run = run
    import qmri.studies

    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(qmri.studies, name, module, raising=False)
    return module


def test_study_gets_the_options(study):
    assert cli.main(STUDY) == 0
    options = ["--protocol", "abdomen", "--seed", "7", "--out", "results", "--fresh"]
    assert cli.main(["study", "training-labels", "--scale", "paper", *options]) == 0
    assert study.calls == [
        {"scale": "quick", "protocol": "paper", "seed": 0, "out": None, "fresh": False},
        {
            "scale": "paper",
            "protocol": "abdomen",
            "seed": 7,
            "out": Path("results"),
            "fresh": True,
        },
    ]


def test_each_study_has_protocols_of_its_own(monkeypatch, capsys):
    crb_loss = stand_in(monkeypatch, "crb_loss")
    assert cli.main(["study", "crb-loss", "--scale", "quick"]) == 0
    assert cli.main(["study", "crb-loss", "--scale", "quick", "--protocol", "default"]) == 0
    assert [call["protocol"] for call in crb_loss.calls] == ["published", "default"]
    with pytest.raises(SystemExit):
        cli.main(["study", "crb-loss", "--scale", "quick", "--protocol", "abdomen"])
    assert "invalid choice: 'abdomen'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["abdomen", "brain"])
def test_studies_in_vivo_have_no_protocols(monkeypatch, capsys, name):
    in_vivo = stand_in(monkeypatch, name)
    assert cli.main(["study", name, "--scale", "quick"]) == 0
    assert cli.main(["study", name, "--scale", "paper", "--seed", "3", "--out", "x"]) == 0
    assert in_vivo.calls == [
        {"scale": "quick", "seed": 0, "out": None, "fresh": False},
        {"scale": "paper", "seed": 3, "out": Path("x"), "fresh": False},
    ]
    with pytest.raises(SystemExit):
        cli.main(["study", name, "--scale", "quick", "--protocol", "paper"])
    assert "unrecognized arguments: --protocol" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["reconstruct"], "invalid choice: 'reconstruct'"),
        (["study"], "{training-labels,crb-loss,abdomen,brain}"),
        (["study", "labels"], "invalid choice: 'labels'"),
        (["study", "training-labels"], "--scale"),
        (["study", "training-labels", "--scale", "huge"], "invalid choice: 'huge'"),
        ([*STUDY, "--protocol", "brain"], "invalid choice: 'brain'"),
        ([*STUDY, "--seed", "-1"], "'-1' is no seed, expected an integer from 0 up"),
        ([*STUDY, "--seed", "1.5"], "'1.5' is no seed"),
        (["fetch"], "NAME --list is required"),
        (["estimate", "dwi.nii.gz"], "required: --bvals, --out"),
        (["fetch", "--list", NAME], "not allowed with"),
    ],
)
def test_wrong_usage_is_explained(study, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert study.calls == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("settings: the folder holds\n stages of another run"),
        CorruptArtefact("grid.npz is cut short"),
        CorruptFile("volunteer1.mat is not the registered one"),
        DataUnavailable("volunteer1.mat is not in the cache"),
        PermissionError(13, "Permission denied", "results"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_the_user_is_one_line(study, capsys, error):
    def fail():
        raise error

    study.does = fail
    assert cli.main(STUDY) == 2
    shown = capsys.readouterr()
    assert shown.err == f"qmri: error: {' '.join(str(error).split())}\n"
    assert shown.out == ""


def test_missing_artefacts_end_in_one_line(study, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("QMRI_ARTEFACTS", str(tmp_path))
    study.does = lambda: Study("training-labels")
    assert cli.main(STUDY) == 2
    shown = capsys.readouterr().err
    assert "run `qmri study training-labels" in shown
    assert shown.count("\n") == 1


def test_mistake_in_the_library_keeps_its_traceback(study):
    study.does = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cli.main(STUDY)


def test_ctrl_c_says_how_to_go_on(study, capsys):
    def interrupt():
        raise KeyboardInterrupt

    study.does = interrupt
    assert cli.main(STUDY) == 130
    message = capsys.readouterr().err.strip()
    assert message == "interrupted: run the same command again to go on"


def test_stages_are_shown_on_stderr_once(study, capsys):
    logger = logging.getLogger("qmri.artefacts")
    study.does = lambda: logger.info("labels: 2.0 s")
    cli.main(STUDY)
    cli.main(STUDY)
    shown = capsys.readouterr()
    assert shown.err == "labels: 2.0 s\n" * 2
    assert shown.out == ""
    logger.info("said outside a command")
    assert capsys.readouterr().err == ""


# Public data


def test_fetch_writes_where_the_files_are(capsys, monkeypatch):
    monkeypatch.setattr(cli, "fetch", lambda name: Path("cache", name))
    assert cli.main(["fetch", NAME, "mt-brain/a.mat"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [str(Path("cache", NAME)), str(Path("cache", "mt-brain", "a.mat"))]


def test_fetch_of_an_unknown_file_lists_the_nearest(capsys):
    assert cli.main(["fetch", "ivim-abdomen/volunter1.mat"]) == 2
    shown = capsys.readouterr().err
    assert NAME in shown
    assert shown.count("\n") == 1


def test_fetch_that_fails_names_the_file(capsys, monkeypatch, tmp_path):
    """An address that nobody answers, so that no network is asked."""
    source = sources.replace(SOURCES[NAME], url="http://127.0.0.1:9/volunteer1.mat")
    monkeypatch.setattr(sources, "SOURCES", MappingProxyType({NAME: source}))
    monkeypatch.setenv("QMRI_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("QMRI_DATA_DIR", raising=False)
    assert cli.main(["fetch", NAME]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"qmri: error: {NAME} is not in the cache")
    assert shown.out == ""


def test_list_shows_every_file_and_which_are_here(capsys, monkeypatch):
    monkeypatch.setattr(cli, "is_available", lambda name: name == NAME)
    assert cli.main(["fetch", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SOURCES)
    assert [line.split()[0] for line in lines if "not here" not in line] == [NAME]
    assert all(source.licence in line for source, line in zip(SOURCES.values(), lines, strict=True))


# As a process of its own


def test_version_is_the_library_s():
    command = [sys.executable, "-m", "qmri.cli", "--version"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == f"qmri {qmri.__version__}\n"


WAITING = """
import sys, time
from types import ModuleType
import qmri.studies
from qmri import cli

def run(**options):
    sys.stdout.write("started\\n")
    sys.stdout.flush()
    time.sleep(60)

study = ModuleType("qmri.studies.training_labels")
study.run = run
sys.modules[study.__name__] = qmri.studies.training_labels = study
sys.exit(cli.main(["study", "training-labels", "--scale", "quick"]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C in another way")
def test_interrupt_signal_ends_the_process_without_a_traceback():
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=30)
    assert process.returncode == 130
    assert shown.strip() == "interrupted: run the same command again to go on"
    assert time.monotonic() - start < 60
