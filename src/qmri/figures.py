"""House style, and the figures that more than one chapter draws.

The same estimator has the same colour and line style in the whole book: colours that readers
with any colour vision tell apart, line styles that tell them apart in print.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike

from qmri.models import Parameter

__all__ = [
    "axis_label",
    "draw_map",
    "line_style",
    "outline",
    "show_maps",
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
    if name not in _LINES:
        raise ValueError(f"name must be one of {sorted(_LINES)}, got {name!r}")
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
