"""Builds matplotlib figures in one common style and renders them as PNG."""

import io
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
"""Line colours that colour-blind people can tell apart too (Okabe and Ito 2008)."""


def new_figure(height: float = 4.5) -> tuple[Any, Any]:
    """Creates a figure with one set of axes.

    Args:
        height: height in inches. The width is 8 inches.

    Returns:
        the matplotlib figure and its axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, so that the caller's backend and open figures stay as they are.
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def as_png(figure: Any) -> bytes:
    """Renders a matplotlib figure and returns the bytes of a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def dress_axes(axes: Any, x: str, y: str, title: str) -> None:
    """Adds labels, title, grid and legend. Titles and legend entries are shown literally; "$" does not start a formula.

    Args:
        axes: matplotlib axes on which all curves have been drawn already, because the legend lists them.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        title: the figure's title.
    """
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)


def legend_name(name: str) -> str:
    """Adds a space before a name that begins with an underscore, because matplotlib hides such names in a legend."""
    return f" {name}" if name.startswith("_") else name
