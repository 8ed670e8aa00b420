"""`make notebooks`: what it stores and what it refuses, on notebooks of a few cells."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

SCRIPT = Path(__file__).parents[1] / "book" / "_tools" / "execute.py"


@pytest.fixture(scope="module")
def execute() -> ModuleType:
    """The command, as a module."""
    specification = importlib.util.spec_from_file_location("qmri_book_execute", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # its dataclasses look themselves up there
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def notebook(tmp_path: Path):
    """Write a notebook with these cells of code and return its path."""

    def write(*sources: str, **metadata: object) -> Path:
        cells = [new_markdown_cell("# A title"), *map(new_code_cell, sources)]
        path = tmp_path / "chapter.ipynb"
        nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
        return path

    return write


def test_stores_outputs_with_counts_in_order(execute, notebook) -> None:
    path = notebook("a = 20", "print(a + 1)", "a + 2")
    execute.run(path)
    code = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == [1, 2, 3]
    assert code[1].outputs[0].text == "21\n"
    assert code[2].outputs[0].data["text/plain"] == "22"


def test_second_run_changes_nothing(execute, notebook) -> None:
    path = notebook(
        "import numpy as np; rng = np.random.default_rng(3)",
        "print(rng.normal(size=3))",
        "print(rng.normal(size=3))",
        qmri={"data": []},
        signature="kept by nobody",
    )
    execute.run(path)
    first = path.read_bytes()
    execute.run(path)
    assert path.read_bytes() == first
    stored = nbformat.read(path, 4)
    nbformat.validate(stored)
    assert "signature" not in stored.metadata
    assert stored.metadata.qmri == {"data": []}
    assert len({c.id for c in stored.cells}) == len(stored.cells)


def test_runs_in_the_folder_of_the_notebook(execute, notebook, tmp_path) -> None:
    (tmp_path / "beside.txt").write_text("found", encoding="utf-8")
    path = notebook("print(open('beside.txt').read())")
    execute.run(path)
    assert "found" in path.read_text(encoding="utf-8")


def test_runs_with_this_python(execute, notebook) -> None:
    """Another kernel of the same name must not sneak in."""
    path = notebook(f"import sys; assert sys.executable == {sys.executable!r}")
    execute.run(path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys; print('careful', file=sys.stderr)", "writes to stderr: careful"),
        ("import warnings; warnings.simplefilter('always'); warnings.warn('old')", "to stderr"),
        ("1 / 0", "raises ZeroDivisionError"),
        ("object()", "memory address"),
        ("import pathlib; print(pathlib.Path.home())", "folder of this machine"),
        (
            "from IPython.display import Image, display\n"
            "display(Image(bytes(200_000), format='png'))",
            "picture of 200 kB",
        ),
        ("print('x' * 2_000_000)", "is 2.00 MB"),
    ],
    ids=["stderr", "warning", "error", "address", "home", "picture", "size"],
)
def test_refuses_and_leaves_the_notebook_alone(execute, notebook, source, reason) -> None:
    path = notebook(source)
    before = path.read_bytes()
    with pytest.raises(execute.Refused, match=reason):
        execute.run(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_refuses_what_takes_too_long(execute, notebook, monkeypatch) -> None:
    monkeypatch.setattr(execute, "MAX_SECONDS", 2.0)
    with pytest.raises(execute.Refused, match="takes longer than 2 s"):
        execute.run(notebook("import time; time.sleep(30)"))


def test_refuses_what_takes_too_much_memory(execute, notebook, monkeypatch) -> None:
    monkeypatch.setattr(execute, "MAX_MEMORY_BYTES", 2.5e8)
    source = "import time; block = bytearray(b'x' * 300_000_000); time.sleep(0.5)"
    with pytest.raises(execute.Refused, match="GB of memory"):
        execute.run(notebook(source))


def test_says_in_one_sentence_which_data_is_missing(execute, notebook, monkeypatch) -> None:
    from qmri import sources

    def unavailable(name: str) -> Path:
        raise sources.DataUnavailable(f"{name} is not here and there is no network.")

    monkeypatch.setattr(sources, "fetch", unavailable)
    path = notebook("print(1)", qmri={"data": ["ivim-abdomen/volunteer1.mat"]})
    with pytest.raises(execute.Refused, match="^ivim-abdomen/volunteer1.mat is not here"):
        execute.run(path)


@pytest.mark.parametrize(
    ("shown", "stored"),
    [
        ("done\n", "done\n"),
        ("step 1\rstep 2\rstep 3\n", "step 3\n"),
        ("  0%|          | 0/5\r100%|#####| 5/5 [00:01<00:00]\nready\n", "ready\n"),
        ("100%|#####| 5/5 [00:01<00:00]", ""),
        ("20 % | of | voxels\n", "20 % | of | voxels\n"),
    ],
)
def test_progress_bars_are_not_stored(execute, shown, stored) -> None:
    assert execute.without_progress(shown) == stored


def test_a_progress_bar_alone_on_stderr_is_no_complaint(execute, notebook) -> None:
    path = notebook("from tqdm import tqdm\nfor _ in tqdm(range(3)): pass")
    execute.run(path)
    assert nbformat.read(path, 4).cells[1].outputs == []


def test_reports_every_notebook_and_fails_for_one(execute, notebook, monkeypatch, capsys) -> None:
    path = notebook("print('fine')")
    missing = path.with_name("missing.ipynb")
    monkeypatch.setattr(sys, "argv", ["execute.py", str(path), str(missing)])
    assert execute.main() == 1
    captured = capsys.readouterr()
    assert f"{path}  " in captured.out
    assert f"{missing}: not stored" in captured.err
