"""Figures as PNGs, in one style for all pictures of runs and studies."""

import io
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
"""Colours that colour-blind people can tell apart too (Okabe and Ito 2008)."""


def new_figure(height: float = 4.5) -> tuple[Any, Any]:
    """A figure with one pair of axes.

    Args:
        height: inches; the width is 8.

    Returns:
        the matplotlib figure and its axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot's: the caller's backend and open figures stay untouched.
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def as_png(figure: Any) -> bytes:
    """A figure as a PNG file's content."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def dress_axes(axes: Any, x: str, y: str, title: str) -> None:
    """Adds labels, grid and legend. Nothing in them is read as mathematics.

    Args:
        axes: matplotlib axes that hold everything the legend is to show.
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
    """A name for a legend; matplotlib leaves out names that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name
