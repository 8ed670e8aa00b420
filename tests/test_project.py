"""The project as a whole: notebooks as readers find them, and facts stated in several places."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
REPOSITORY = "https://github.com/qmri-book/qmri-book"
SITE = "https://qmri-book.github.io/qmri-book/"
MAX_NOTEBOOK_BYTES = 1_500_000
MAX_IMAGE_BYTES = 150_000
MAX_TRACKED_BYTES = 60_000_000
CHART = re.compile(r"application/vnd\.vegalite\.v\d+\+json")
SECTIONS = ("The idea", "By hand", "With qmri", "When it fails", "Exercises", "Key points")
PRIVATE_PATH = re.compile(
    r"(?<![\w/.:])/(?:home|root|tmp|work|Users|private|mnt)/\w|[A-Z]:\\\\Users"
)

NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if re.match(r"\d\d-", path.name)]


def toc() -> dict:
    """Read _toc.yml."""
    return yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))


def toc_files() -> list[str]:
    """Return the pages of the book in order, without suffix."""
    contents = toc()
    chapters = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    return [contents["root"], *chapters]


def read(path: Path) -> dict:
    """Read a notebook as plain JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    """Return the code cells that hold code."""
    return [
        c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()
    ]


def outputs(notebook: dict) -> list[tuple[dict, dict]]:
    """Return every output with the cell it belongs to."""
    return [(cell, output) for cell in code_cells(notebook) for output in cell["outputs"]]


def is_picture(output: dict) -> bool:
    """Say whether an output is an image or a chart."""
    return any(key.startswith("image/") or CHART.match(key) for key in output.get("data", {}))


def tracked_files() -> list[Path]:
    """Return the files that git tracks, or skip where there is no repository."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.name)
each_lesson = pytest.mark.parametrize(
    "path", [BOOK / "template.ipynb", *CHAPTERS], ids=lambda path: path.name
)


def test_every_page_in_the_contents_exists() -> None:
    for name in toc_files():
        assert (ROOT / f"{name}.md").exists() or (ROOT / f"{name}.ipynb").exists(), name


@each_chapter
def test_every_chapter_is_in_the_contents(path: Path) -> None:
    assert f"book/{path.stem}" in toc_files()


@each_notebook
def test_notebook_was_executed_from_top_to_bottom(path: Path) -> None:
    counts = [cell["execution_count"] for cell in code_cells(read(path))]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_notebook_shows_no_error_and_no_warning(path: Path) -> None:
    for _, output in outputs(read(path)):
        assert output["output_type"] != "error", output
        assert output.get("name") != "stderr", output["text"]


@each_notebook
def test_notebook_has_normal_metadata(path: Path) -> None:
    """Only what `make notebooks` keeps: a diff then shows what its author changed."""
    metadata = read(path)["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert "version" not in metadata["language_info"]
    assert set(metadata) <= {"kernelspec", "language_info", "mystnb", "qmri"}
    identifiers = [cell["id"] for cell in read(path)["cells"]]
    assert len(set(identifiers)) == len(identifiers)


@each_notebook
def test_every_figure_has_alt_text_and_a_caption(path: Path) -> None:
    for cell, output in outputs(read(path)):
        if is_picture(output):
            options = cell["metadata"].get("mystnb", {})
            start = "".join(cell["source"])[:80]
            assert options.get("image", {}).get("alt", "").strip(), f"no alt text: {start}"
            assert options.get("figure", {}).get("caption", "").strip(), f"no caption: {start}"


@each_notebook
def test_named_figures_are_the_only_picture_of_their_cell(path: Path) -> None:
    """Two pictures in one cell would share one name, and a reference would find either."""
    for cell in code_cells(read(path)):
        if cell["metadata"].get("mystnb", {}).get("figure", {}).get("name"):
            assert sum(is_picture(output) for output in cell["outputs"]) == 1


@each_notebook
def test_charts_are_stored_as_data(path: Path) -> None:
    """No chart brings HTML along: that would load its script from another site."""
    for _, output in outputs(read(path)):
        if any(CHART.match(key) for key in output.get("data", {})):
            assert "text/html" not in output["data"]


@each_notebook
def test_notebook_and_its_pictures_are_small(path: Path) -> None:
    assert path.stat().st_size <= MAX_NOTEBOOK_BYTES
    for cell, output in outputs(read(path)):
        picture = base64.b64decode("".join(output.get("data", {}).get("image/png", "")))
        assert len(picture) <= MAX_IMAGE_BYTES, "".join(cell["source"])[:80]


def test_stored_pictures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (BOOK / "_static").glob("*.png")}
    assert all(size <= MAX_IMAGE_BYTES for size in sizes.values()), sizes


@each_notebook
def test_notebook_names_no_folder_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert PRIVATE_PATH.findall(re.sub(r'"image/png": "[^"]*"', "", text)) == []


@each_notebook
def test_notebook_lists_public_files_that_exist(path: Path) -> None:
    from qmri.sources import SOURCES

    for name in read(path)["metadata"].get("qmri", {}).get("data", []):
        assert name in SOURCES


@each_notebook
def test_notebook_lists_every_public_file_it_fetches(path: Path) -> None:
    """Otherwise its test would fail without a network instead of saying what is missing."""
    notebook = read(path)
    code = "\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    listed = notebook["metadata"].get("qmri", {}).get("data", [])
    for name in re.findall(r"""fetch\(\s*["']([\w./-]+)["']""", code):
        assert name in listed


@each_lesson
def test_chapter_follows_the_template(path: Path) -> None:
    notebook = read(path)
    prose = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]
    headings = re.findall(r"^(#+) +(.+?)\s*$", "\n\n".join(prose), flags=re.M)
    assert [level for level, _ in headings].count("#") == 1
    assert headings[0][0] == "#"
    titles = [title for level, title in headings if level == "##"]
    places = [titles.index(section) for section in SECTIONS]
    assert places == sorted(places)
    assert titles[-1] == "References"
    text = "\n".join(prose)
    assert "{admonition} What you will learn" in text
    exercises = re.findall(r"\{exercise(?:-start)?\}", text)
    solutions = re.findall(r"\{solution(?:-start)?\}", text)
    assert 3 <= len(exercises) <= 5
    assert len(solutions) == len(exercises)


@each_notebook
def test_code_of_a_solution_is_folded_away(path: Path) -> None:
    """A reader who opens the notebook must not read the answer while reading the question."""
    inside = False
    for cell in read(path)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and inside:
            assert cell["metadata"].get("jupyter", {}).get("source_hidden"), source[:80]
        elif cell["cell_type"] == "markdown":
            marks = re.findall(r"\{solution-(start|end)\}", source)
            inside = marks[-1] == "start" if marks else inside


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changes, flags=re.M)
    import qmri

    assert project["version"] == str(citation["version"]) == newest[1] == qmri.__version__
    assert importlib.metadata.version("qmri-book") == project["version"]


def test_addresses_are_the_same_everywhere() -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert config["repository"]["url"] == REPOSITORY
    assert project["urls"]["Repository"] == citation["repository-code"] == REPOSITORY
    assert config["html"]["baseurl"] == project["urls"]["Book"] == citation["url"] == SITE
    assert SITE in readme


def test_licences_are_said() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "BSD 3-Clause" in readme and "CC BY 4.0" in readme
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("BSD 3-Clause License")
    assert "CC BY 4.0" in (ROOT / "LICENSE-text").read_text(encoding="utf-8")


def test_requirements_pin_every_dependency_of_the_library() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    }
    needed = {re.match(r"[\w-]+", dependency)[0].lower() for dependency in project["dependencies"]}
    assert needed <= pinned


def test_pictures_and_links_of_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for alt, target in re.findall(r"!?\[([^\]]*)\]\(([^)]+)\)", readme):
        assert alt.strip(), target
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_repository_is_small_and_holds_no_public_data() -> None:
    files = tracked_files()
    assert sum(path.stat().st_size for path in files) < MAX_TRACKED_BYTES
    assert [
        p.name for p in files if p.suffix in (".mat", ".npy", ".nii") or p.suffix == ".gz"
    ] == []


def test_code_follows_the_style() -> None:
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "."], ["format", "--check", "."]):
        result = subprocess.run([*ruff, *command], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
