"""Sphinx extension of the book: charts that need no network, references by surname.

A notebook stores an Altair chart as data (``application/vnd.vegalite.v5+json``), which
JupyterLab draws by itself. This module draws the same chart in the built page: the chart's
JSON goes into the page, and one script, bundled at build time from the ``vl-convert-python``
package, is loaded by those pages alone that hold a chart.

The text cites author and year, so `SurnameFirst` prints the bibliography as readers look for
it there: by surname.

myst-nb finds `VegaLiteRenderer` through the entry point ``myst_nb.mime_renderers``; Sphinx
calls `setup` because ``_config.yml`` lists ``qmri._sphinx``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle

if TYPE_CHECKING:
    from myst_nb.core.render import MimeData, NbElementRenderer
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

MIME_TYPE = "application/vnd.vegalite.v5+json"
VEGA_LITE_VERSION = "5.20"
SCRIPT = "vega-charts.js"

# Views laid side by side have no single width to stretch; the style sheet scales them instead.
COMPOSED = ("concat", "hconcat", "vconcat", "facet", "repeat")

DRAW_CHARTS = """
for (const chart of document.querySelectorAll("div.vega-chart")) {
  const spec = JSON.parse(chart.querySelector("script").textContent);
  const canvas = chart.appendChild(document.createElement("div"));
  vegaEmbed(canvas, spec, { actions: false, renderer: "svg" }).catch((error) => {
    canvas.textContent = "This chart could not be drawn: " + error.message;
    console.error(error);
  });
}
"""


class VegaChart(nodes.General, nodes.Element):
    """A chart in the document: attribute ``spec`` holds its Vega-Lite JSON text."""


def chart_node(spec: dict, alt: str) -> VegaChart:
    """Prepare one chart for the page.

    Parameters
    ----------
    spec : dict
        A Vega-Lite 5 specification. A single view stretches with the page, up to the width
        that its author gave it.
    alt : str
        What the chart shows, in words; screen readers read it instead of the picture.

    Returns
    -------
    VegaChart
        Node with ``spec`` (JSON text), ``alt`` and ``width`` (widest, in pixels; 0: as drawn).
    """
    spec = {**spec, "description": alt}
    width = spec.get("width", spec.get("config", {}).get("view", {}).get("continuousWidth", 0))
    if any(key in spec for key in COMPOSED) or not isinstance(width, int | float):
        width = 0
    elif width:
        spec |= {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return VegaChart(spec=json.dumps(spec), alt=alt, width=width)


class VegaLiteRenderer:
    """Draw Vega-Lite outputs as charts; the alt text comes from the cell's metadata.

    The cell metadata are those of an image: ``mystnb.image.alt`` holds the alt text and
    ``mystnb.figure`` the caption and the name. A chart without alt text is a warning.
    """

    mime_priority_overrides: ClassVar[Sequence[tuple[str, str, int]]] = [
        (builder, MIME_TYPE, 5) for builder in ("html", "dirhtml", "singlehtml")
    ]

    @staticmethod
    def handle_mime(
        renderer: NbElementRenderer, data: MimeData, inline: bool
    ) -> list[nodes.Element] | None:
        """Return the chart's node, or None for an output that is not a Vega-Lite chart."""
        if inline or data.mime_type != MIME_TYPE:
            return None
        options = renderer.renderer.get_cell_level_config(
            "render_image_options", data.cell_metadata, line=data.line
        )
        alt = str(options.get("alt") or data.content.get("description", ""))
        if not alt:
            renderer.logger.warning(
                "a chart has no alt text: give its cell the metadata mystnb.image.alt",
                subtype="chart",
                line=data.line,
            )
        return [chart_node(data.content, alt)]


class SurnameFirst(PlainStyle):
    """References in the order of authors, year and title, written as "Le Bihan, D., ..."."""

    def __init__(self) -> None:
        super().__init__(name_style="lastfirst", abbreviate_names=True)


def visit_html(translator: HTML5Translator, node: VegaChart) -> None:
    """Write the chart's JSON into the page, where `DRAW_CHARTS` finds it."""
    style = f' style="max-width: {node["width"]}px"' if node["width"] else ""
    spec = node["spec"].replace("<", "\\u003c")  # no text of the chart can end the script
    translator.body.append(
        f'<div class="vega-chart output"{style}>'
        f'<script type="application/json">{spec}</script>'
        f"<noscript>{escape(node['alt'])}</noscript></div>\n"
    )
    raise nodes.SkipNode


def add_script(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    """Give the page the script that draws charts, if it holds any."""
    if doctree is None or not any(doctree.findall(VegaChart)):
        return
    script = Path(app.outdir) / "_static" / SCRIPT
    if not script.exists():
        import vl_convert  # takes seconds: only a book with charts pays for it

        bundle = vl_convert.javascript_bundle(DRAW_CHARTS, vl_version=VEGA_LITE_VERSION)
        script.parent.mkdir(parents=True, exist_ok=True)
        # A scope of its own: the bundle's short names would clash with other scripts' names.
        script.write_text(f"(() => {{\n{bundle}\n}})();\n", encoding="utf-8")
    app.add_js_file(SCRIPT, loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the chart node and its script with Sphinx, and the style of the references."""
    register_plugin("pybtex.style.formatting", "surname_first", SurnameFirst)
    app.add_node(VegaChart, html=(visit_html, None))
    app.connect("html-page-context", add_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
