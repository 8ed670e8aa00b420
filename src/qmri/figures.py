"""House style, and the figures that more than one chapter draws.

The same estimator has the same colour and line style in the whole book: colours that readers
with any colour vision tell apart, line styles that tell them apart in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike

from qmri._choices import check_choice
from qmri.evaluation import GridStatistics, marginal, mean_map
from qmri.models import Parameter

__all__ = [
    "axis_label",
    "draw_map",
    "line_style",
    "outline",
    "show_maps",
    "show_marginals",
    "show_mean_maps",
    "unit_label",
    "use_style",
]

BACKGROUND = "0.88"

_LINES = {
    "truth": {"color": "black", "linestyle": "--", "label": "truth"},
    "bound": {"color": "0.5", "linestyle": (0, (1, 1)), "label": "Cramér–Rao bound"},
    "mle-rician": {"color": "black", "linestyle": "-", "label": "MLE, Rician"},
    "mle-gaussian": {"color": "#CC3311", "linestyle": "-.", "label": "MLE, Gaussian"},
    "segmented": {"color": "#0077BB", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "label": "segmented"},
    "supervised-gt": {"color": "#EE7733", "linestyle": (0, (6, 2)), "label": "SupervisedGT"},
    "self-supervised": {"color": "#009988", "linestyle": ":", "label": "Self-supervised"},
    "supervised-mle-rician": {
        "color": "#EE3377",
        "linestyle": (0, (12, 1.5)),
        "label": "SupervisedMLE, Rician",
    },
    "supervised-mle-gaussian": {
        "color": "#882255",
        "linestyle": (0, (4, 1, 1, 1)),
        "label": "SupervisedMLE, Gaussian",
    },
    "hybrid-0.5": {
        "color": "#33BBEE",
        "linestyle": (0, (8, 1, 2, 1)),
        "label": r"Hybrid, $\alpha = 0.5$",
    },
    "supervised-mle-rician-f": {
        "color": "#0077BB",
        "linestyle": (0, (3, 2)),
        "label": "SupervisedMLE, all on $f$",
    },
    "supervised-mle-rician-dslow": {
        "color": "#999933",
        "linestyle": (0, (3, 1, 1, 1, 1, 1)),
        "label": r"SupervisedMLE, all on $D_\mathrm{slow}$",
    },
    "supervised-mle-rician-dfast": {
        "color": "#332288",
        "linestyle": (0, (1, 2)),
        "label": r"SupervisedMLE, all on $D_\mathrm{fast}$",
    },
    "supervised-gt-mae": {
        "color": "#CCBB44",
        "linestyle": (0, (6, 2, 1, 2)),
        "label": "SupervisedGT, MAE",
    },
    "supervised-mle-rician-mae": {
        "color": "#BB5566",
        "linestyle": (0, (2, 1)),
        "label": "SupervisedMLE, Rician, MAE",
    },
}

_UNITS = {
    "1": "",
    "um2/ms": "µm²/ms",
    "s/mm2": "s/mm²",
    "1/s": "1/s",
    "rad/s": "rad/s",
}


def use_style() -> None:
    """Switch Matplotlib, and a notebook's figures, to the style of the book."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 12,
            "axes.labelsize": 11,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "image.interpolation": "nearest",
            "image.cmap": "gray",
            "figure.facecolor": "white",
            "svg.hashsalt": "qmri",
        },
    )
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("retina")


def line_style(name: str) -> dict[str, object]:
    """Colour, line style and label of an estimator, as keywords for ``Axes.plot``.

    Parameters
    ----------
    name : str
        ``"truth"``, ``"bound"`` or an estimator's name.

    Raises
    ------
    ValueError
        If the name has no style.
    """
    check_choice("name", name, sorted(_LINES))
    return dict(_LINES[name])


def unit_label(unit: str) -> str:
    """A unit as a reader expects it, e.g. ``"µm²/ms"``; empty for a number without unit."""
    return _UNITS.get(unit, unit)


def axis_label(parameter: Parameter) -> str:
    """Symbol and unit of a parameter, for an axis or a colour bar."""
    unit = unit_label(parameter.unit)
    return f"${parameter.symbol}$ ({unit})" if unit else f"${parameter.symbol}$"


def draw_map(
    axes: Axes,
    values: ArrayLike,
    limits: tuple[float, float],
    label: str,
    cmap: str | Colormap = "viridis",
) -> AxesImage:
    """One parameter map with its colour bar; NaN is background.

    Parameters
    ----------
    axes : matplotlib Axes
    values : (rows, columns)
        NaN outside the mask.
    limits : (low, high)
        Ends of the colour scale, in the unit of the map; the colour bar has a pointed end
        where values lie beyond.
    label : str
        For the colour bar, e.g. from :func:`axis_label`.
    cmap : str or Colormap
        Perceptually uniform; grey is for images that are not quantitative.
    """
    values = np.asarray(values, dtype=np.float64)
    low, high = limits
    finite = values[np.isfinite(values)]
    below, above = bool(np.any(finite < low)), bool(np.any(finite > high))
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    colours = plt.get_cmap(cmap).with_extremes(bad=BACKGROUND)
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(
        image, ax=axes, orientation="horizontal", extend=extend, pad=0.03, fraction=0.06, aspect=18
    )
    bar.set_label(label)
    bar.outline.set_visible(False)
    return image


def show_maps(
    maps: Mapping[str, ArrayLike],
    parameters: Mapping[str, Parameter],
    limits: Mapping[str, tuple[float, float]],
    cmap: str | Colormap = "viridis",
) -> Figure:
    """A row of parameter maps, one for each name in `limits`.

    Parameters
    ----------
    maps : mapping of name to (rows, columns)
        As from ``qmri.volumes.estimate_maps``, NaN outside the mask.
    parameters : mapping of name to Parameter
        For symbols and units.
    limits : mapping of name to (low, high)
        Which maps to draw, in which order, with which colour scale.
    cmap : str or Colormap

    Returns
    -------
    matplotlib Figure
    """
    missing = [name for name in limits if name not in maps or name not in parameters]
    if missing:
        raise ValueError(f"limits must name maps among {list(maps)}, got {missing}")
    figure, axes = plt.subplots(1, len(limits), figsize=(2.6 * len(limits), 3.2), squeeze=False)
    for panel, (name, ends) in zip(axes[0], limits.items(), strict=True):
        draw_map(panel, maps[name], ends, axis_label(parameters[name]), cmap)
    return figure


def outline(axes: Axes, mask: ArrayLike, color: str = "white", label: str | None = None) -> None:
    """Draw the border of a region along pixel edges.

    Parameters
    ----------
    axes : matplotlib Axes
        Holding an image of the same shape.
    mask : (rows, columns) of bool
    color : str
    label : str, optional
        For the legend.
    """
    mask = np.pad(np.asarray(mask, dtype=bool), 1)
    segments = []
    for row, column in np.argwhere(mask[:, 1:] != mask[:, :-1]):
        segments.append(((column - 0.5, column - 0.5), (row - 1.5, row - 0.5)))
    for row, column in np.argwhere(mask[1:] != mask[:-1]):
        segments.append(((column - 1.5, column - 0.5), (row - 0.5, row - 0.5)))
    xs, ys = [], []
    for x, y in segments:
        xs += [*x, np.nan]
        ys += [*y, np.nan]
    axes.plot(xs, ys, color=color, linewidth=1.0, label=label)


METRICS = {"bias": "bias", "sd": "SD", "rmse": "RMSE"}


def show_marginals(
    statistics: Mapping[str, GridStatistics],
    parameters: Sequence[str] = ("f", "Dslow", "Dfast"),
    metrics: Sequence[str] = ("bias", "sd", "rmse"),
    spread: Sequence[str] = (),
) -> Figure:
    """Bias, SD and RMSE of some estimators against the true value of each parameter.

    Parameters
    ----------
    statistics : mapping of estimator name to GridStatistics
        Names as for :func:`line_style`.
    parameters : sequence of str
        One column of panels each.
    metrics : sequence of {"bias", "sd", "rmse"}
        One row of panels each.
    spread : sequence of str
        Estimators with a band for the 10th to 90th percentile over the other parameters.

    Returns
    -------
    matplotlib Figure
    """
    unknown = [m for m in metrics if m not in METRICS] + [s for s in spread if s not in statistics]
    if unknown or not statistics:
        raise ValueError(
            f"metrics must be among {list(METRICS)} and spread among {list(statistics)}, "
            f"got {unknown or 'no statistics'}"
        )
    figure, axes = plt.subplots(
        len(metrics), len(parameters), sharex="col", squeeze=False,
        figsize=(3.1 * len(parameters) + 0.4, 1.9 * len(metrics) + 1.0),
    )  # fmt: skip
    for name, found in statistics.items():
        style = line_style(name)
        for row, metric in zip(axes, metrics, strict=True):
            for panel, parameter in zip(row, parameters, strict=True):
                curve = marginal(found.grid, getattr(found, metric), parameter)
                panel.plot(curve.levels, curve.mean, **style)
                if name in spread:
                    panel.fill_between(
                        curve.levels, curve.low, curve.high, color=style["color"], alpha=0.15, lw=0
                    )
    model = next(iter(statistics.values())).grid.model
    described = {p.name: p for p in model.parameters}
    for panel, parameter in zip(axes[-1], parameters, strict=True):
        panel.set_xlabel(f"true {axis_label(described[parameter])}")
    for row, metric in zip(axes, metrics, strict=True):
        for panel, parameter in zip(row, parameters, strict=True):
            panel.set_ylabel(f"{METRICS[metric]} of {axis_label(described[parameter])}")
            if metric == "bias":
                panel.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            else:
                panel.set_ylim(bottom=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)))
    return figure


def show_mean_maps(
    statistics: Mapping[str, GridStatistics], x: str, y: str, columns: int = 3
) -> Figure:
    """Where estimators move the tissue: arrows from the truth to the mean estimate.

    Parameters
    ----------
    statistics : mapping of estimator name to GridStatistics
        One panel each.
    x, y : str
        Parameters of the plane; averages over the others are shown.
    columns : int
        Panels in a row.

    Returns
    -------
    matplotlib Figure
    """
    rows = -(-len(statistics) // columns)
    figure, axes = plt.subplots(
        rows, columns, sharex=True, sharey=True, squeeze=False,
        figsize=(3.0 * columns + 0.6, 2.8 * rows + 0.4),
    )  # fmt: skip
    for panel, (name, found) in zip(axes.flat, statistics.items(), strict=False):
        style = line_style(name)
        truth, mean = mean_map(found, x, y)
        start, move = truth.reshape(-1, 2), (mean - truth).reshape(-1, 2)
        panel.plot(*start.T, ".", color="0.75", markersize=3)
        panel.quiver(
            *start.T, *move.T, angles="xy", scale_units="xy", scale=1, color=style["color"],
            width=0.006,
        )  # fmt: skip
        panel.set_title(style["label"], fontsize=10)
    described = {p.name: p for p in next(iter(statistics.values())).grid.model.parameters}
    for panel in axes.flat[len(statistics) :]:
        panel.set_visible(False)
    for panel in axes[-1]:
        panel.set_xlabel(axis_label(described[x]))
    for panel in axes[:, 0]:
        panel.set_ylabel(axis_label(described[y]))
    return figure
