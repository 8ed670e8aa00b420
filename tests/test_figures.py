"""The house style: what a reader sees must be what the numbers say."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from qmri import IVIM, figures


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_every_line_differs_in_colour_or_dash_in_print():
    styles = [figures.line_style(name) for name in figures._LINES]
    seen = {(style["color"], str(style["linestyle"])) for style in styles}
    dashes = [str(style["linestyle"]) for style in styles]
    assert len(seen) == len(styles) == len(set(dashes))


def test_unknown_estimator_has_no_style():
    with pytest.raises(ValueError, match="name must be one of.*mle-rician.*got 'magic'"):
        figures.line_style("magic")


def test_changing_a_style_changes_nobody_elses():
    figures.line_style("truth")["color"] = "pink"
    assert figures.line_style("truth")["color"] == "black"


def test_axis_labels_carry_units():
    labels = [figures.axis_label(p) for p in IVIM([0, 100]).parameters]
    assert labels[1] == "$f$"
    assert labels[2].endswith("(µm²/ms)") and "slow" in labels[2]


@pytest.mark.parametrize(
    ("values", "extend"),
    [([0.2, 0.8], "neither"), ([-1, 0.5], "min"), ([0.5, 2], "max"), ([-1, 2], "both")],
)
def test_the_colour_bar_points_where_values_lie_beyond(values, extend):
    _, axes = plt.subplots()
    image = figures.draw_map(axes, [[*values, np.nan]], (0, 1), "x")
    assert image.colorbar.extend == extend
    assert image.cmap(np.ma.masked)[0] == pytest.approx(float(figures.BACKGROUND))


def test_maps_without_limits_are_not_guessed():
    parameters = {p.name: p for p in IVIM([0, 100]).parameters}
    with pytest.raises(ValueError, match=r"limits must name maps.*\['Dslow'\]"):
        figures.show_maps({"f": np.zeros((2, 2))}, parameters, {"Dslow": (0, 3)})
    figure = figures.show_maps({"f": np.zeros((2, 2))}, parameters, {"f": (0, 0.5)})
    assert figure.axes[1].get_xlabel() == "$f$"


def test_an_outline_runs_along_the_edges_of_the_region():
    _, axes = plt.subplots()
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 2] = True  # one column wide, two rows high
    figures.outline(axes, mask)
    x, y = axes.lines[0].get_data()
    x, y = np.array(x), np.array(y)
    length = np.nansum(np.hypot(np.diff(x), np.diff(y)))
    assert length == pytest.approx(2 * (1 + 2))
    assert (np.nanmin(x), np.nanmax(x)) == (1.5, 2.5)
    assert (np.nanmin(y), np.nanmax(y)) == (0.5, 2.5)
