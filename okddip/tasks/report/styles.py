"""How figures look: a colour and a marker for each method, the papers' names, sizes and legends.

The first colours are those of Okabe and Ito (Color Universal Design, 2008) without yellow, which white paper
swallows, the others from Tol's muted scheme; a marker says the same as a colour. What varies within a method
is told apart by line styles and shades. Figures are drawn without pyplot, whose state is global.
"""

import hashlib
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from okddip.tasks.report.compare import Comparison, Group
from okddip.text import FIGURES, for_terminal

# the paper's name of a method, its colour and its marker, in every figure of every report
METHODS = {
    "baseline": ("Baseline", "#000000", "s"),
    "independent": ("Ind", "#888888", "d"),
    "kd": ("KD", "#56B4E9", "^"),
    "dml": ("DML", "#009E73", "D"),
    "cl_ilr": ("CL-ILR", "#CC79A7", "v"),
    "one": ("ONE", "#E69F00", "P"),
    "okddip": ("OKDDip", "#D55E00", "o"),
    "kdcl": ("KDCL", "#0072B2", "<"),
    "ffl": ("FFL", "#999933", ">"),
    "pcl": ("PCL", "#332288", "X"),
}
OTHER_COLORS = ("#44AA99", "#AA4499", "#8C564B", "#117733", "#882255")
OTHER_MARKERS = ("*", "p", "8", "H", "h")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
DPI = 200
RC_PARAMS = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters stay letters in the PDF
    **FIGURES,
}
WIDTH, HEIGHT = 6.3, 2.8  # inches; the text width of A4, and a height to which a legend adds
LEGEND_ROW = 0.18  # inches
LIGHTEST = 0.45  # share of white in the last shade of a method


@dataclass
class Series:
    """A group as figures show it."""

    group: Group
    name: str  # the paper's name of the method, and what tells the group apart within it
    label: str  # the same and whose accuracy it is: `OKDDip, 3 peers (leader)`
    style: dict[str, Any]  # colour, marker and line


def series_of(comparison: Comparison, model: str) -> list[Series]:
    """The groups of one model, in the order of the table; no two look the same."""
    chosen = [group for group in comparison.groups if group.settings["model"] == model]
    counts = Counter(look(group.method) for group in chosen)
    used: Counter[tuple[str, str]] = Counter()
    found = []
    for group in chosen:
        color, marker = look(group.method)
        number, most = used[color, marker], counts[color, marker]
        used[color, marker] += 1
        style = {
            "color": shade(color, LIGHTEST * number / max(1, most - 1)),
            "marker": marker,
            "linestyle": LINES[number % len(LINES)],
            "markersize": 5,
            "linewidth": 1.3,
        }
        name = for_terminal(
            METHODS.get(group.method, (group.method,))[0] + comparison.label(group).removeprefix(group.method)
        )
        predictor = f" ({for_terminal(group.predictor)})" if group.predictor else ""
        found.append(Series(group, name, name + predictor, style))
    return found


def look(method: str) -> tuple[str, str]:
    """Colour and marker of a method; of somebody's own, by its name, so that they stay what they are."""
    if method in METHODS:
        _, color, marker = METHODS[method]
        return color, marker
    number = hashlib.sha256(method.encode(errors="replace")).digest()[0]
    return OTHER_COLORS[number % len(OTHER_COLORS)], OTHER_MARKERS[number // 4 % len(OTHER_MARKERS)]


def shade(color: str, white: float) -> tuple[float, float, float]:
    """A colour mixed with a share of white."""
    red, green, blue = (part + (1 - part) * white for part in to_rgb(color))
    return red, green, blue


def new_figure(title: str, panels: int = 1, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def legend_below(figure: Figure, handles: Sequence[Any], title: str) -> None:
    """Under the axes, where it covers no line; the figure grows by its rows."""
    labels = [handle.get_label() for handle in handles]
    columns = 2 if max(map(len, labels)) > 20 else 3
    labels = [textwrap.fill(label, 36) for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)
    rows = math.ceil(len(labels) / columns) * max(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * (1 + rows))


def seeds_of(groups: Iterable[Group]) -> str:
    """How many seeds groups have: `3 seeds`, `2 to 5 seeds`."""
    counts = sorted({len(group.runs) for group in groups})
    if counts == [1]:
        return "one seed"
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def groups_of(series: Sequence[Series]) -> list[Group]:
    return [each.group for each in series]
