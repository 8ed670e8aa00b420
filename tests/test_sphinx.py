"""The Sphinx extension: charts of a notebook as charts of the page, and nothing elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import altair as alt
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from pybtex.database import parse_string
from sphinx.testing.util import SphinxTestApp

from qmri._sphinx import MIME_TYPE, SCRIPT, SurnameFirst, chart_node

SPEC = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.20.1.json",
    "data": {"values": [{"b": 0, "label": "</script><b>&"}, {"b": 10, "label": "slow"}]},
    "mark": "point",
    "encoding": {"x": {"field": "b", "type": "quantitative"}},
    "width": 420,
}


def chart_notebook(metadata: dict, spec: dict = SPEC) -> str:
    """Return a notebook with a title and one chart."""
    output = new_output("execute_result", {MIME_TYPE: spec, "text/plain": "a chart"})
    cell = new_code_cell("chart", outputs=[output], metadata=metadata, execution_count=1)
    title = nbformat.v4.new_markdown_cell("# Charts")
    language = {"name": "python", "pygments_lexer": "ipython3"}
    return nbformat.writes(new_notebook(cells=[title, cell], metadata={"language_info": language}))


def build(folder: Path, builder: str, pages: dict[str, str]) -> str:
    """Build these pages with the extension; return the warnings."""
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "conf.py").touch()
    settings = {
        "extensions": ["myst_nb", "qmri._sphinx"],
        "nb_execution_mode": "off",
        "root_doc": "plain",
        "numfig": True,
    }
    app = SphinxTestApp(builder, srcdir=folder, builddir=folder / "out", confoverrides=settings)
    try:
        app.build()
        return app.warning.getvalue()
    finally:
        app.cleanup()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built site of two pages; only one holds a chart."""
    folder = tmp_path_factory.mktemp("site")
    metadata = {
        "mystnb": {
            "image": {"alt": 'Points at "0" and 10'},
            "figure": {"caption": "Two points.", "name": "fig-points"},
        }
    }
    pages = {
        "plain.md": "# Plain\n\n{numref}`fig-points`\n\n```{toctree}\ncharts\n```\n",
        "charts.ipynb": chart_notebook(metadata),
    }
    assert build(folder, "html", pages) == ""
    return folder / "out" / "html"


class Specifications(HTMLParser):
    """Collects the chart specifications as a browser would read them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note where a chart's data begin."""
        self._inside = tag == "script" and ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        """Read a chart's data."""
        if self._inside:
            self.found.append(json.loads(data))
            self._inside = False


def test_page_holds_the_whole_specification(site: Path) -> None:
    """Also text that looks like the end of a script survives the way through the page."""
    parser = Specifications()
    parser.feed((site / "charts.html").read_text(encoding="utf-8"))
    (spec,) = parser.found
    assert spec["data"] == SPEC["data"]
    assert spec["encoding"] == SPEC["encoding"]
    assert spec["description"] == 'Points at "0" and 10'


def test_chart_has_caption_number_and_name(site: Path) -> None:
    page = (site / "charts.html").read_text(encoding="utf-8")
    assert re.search(r'<figure[^>]*id="fig-points"', page)
    assert "Two points." in page[page.index("<figcaption") :]
    assert ">Fig. 1</span>" in (site / "plain.html").read_text(encoding="utf-8")


def test_only_the_page_with_the_chart_loads_the_script(site: Path) -> None:
    assert SCRIPT in (site / "charts.html").read_text(encoding="utf-8")
    assert SCRIPT not in (site / "plain.html").read_text(encoding="utf-8")


def test_script_is_complete_and_stays_at_home(site: Path) -> None:
    script = (site / "_static" / SCRIPT).read_text(encoding="utf-8")
    assert len(script) > 500_000
    assert not re.search(r"""\b(import|importScripts)\s*\(?\s*["']https?:""", script)


def test_chart_without_alt_text_is_a_warning(tmp_path: Path) -> None:
    warnings = build(tmp_path, "html", {"plain.md": "# Plain", "charts.ipynb": chart_notebook({})})
    assert "no alt text" in warnings
    assert "charts.ipynb" in warnings


def test_other_builders_keep_the_words(tmp_path: Path) -> None:
    alt_text = {"mystnb": {"image": {"alt": "Two points"}}}
    pages = {
        "plain.md": "# Plain\n\n```{toctree}\ncharts\n```",
        "charts.ipynb": chart_notebook(alt_text),
    }
    assert build(tmp_path, "text", pages) == ""
    assert "a chart" in (tmp_path / "out" / "text" / "charts.txt").read_text(encoding="utf-8")


def test_single_view_stretches_up_to_its_width() -> None:
    node = chart_node(SPEC, "points")
    assert node["width"] == 420
    assert json.loads(node["spec"])["width"] == "container"


def test_views_side_by_side_keep_their_widths() -> None:
    both = {"hconcat": [SPEC, SPEC]}
    node = chart_node(both, "points twice")
    assert node["width"] == 0
    assert json.loads(node["spec"]) == both | {"description": "points twice"}


def test_installed_altair_writes_what_the_book_and_jupyterlab_draw() -> None:
    """JupyterLab 4 draws Vega-Lite 5; a chart of another version would be an empty box."""
    chart = alt.Chart(alt.sequence(3)).mark_point()
    with alt.renderers.enable("mimetype"):
        (bundle, _) = chart._repr_mimebundle_()
    assert set(bundle) == {MIME_TYPE, "text/plain"}


def test_references_are_found_by_surname() -> None:
    """The text cites (Le Bihan, 1988), so the list is sorted by and begins with that name."""
    library = parse_string(
        "@misc{a, author = {Zhang, Xiaoxia and Liu, Kangning}, title = {Maps}, year = 2022}"
        "@misc{b, author = {Le Bihan, Denis}, title = {Images}, year = 1988}",
        "bibtex",
    )
    references = SurnameFirst().format_entries(library.entries.values())
    printed = [reference.text.render_as("text") for reference in references]
    assert printed == ["Le Bihan, D. Images. 1988.", "Zhang, X. and Liu, K. Maps. 2022."]
