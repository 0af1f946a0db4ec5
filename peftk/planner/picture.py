"""Plans as stacked bars, with the cards that they are held against."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftk.atomic import write_file
from peftk.planner.planning import ORDER, Plan
from peftk.planner.step import KINDS

# By kind, so that a kind has one colour in every picture: stored weights in blues, training states in warm tones.
COLOURS = {
    "weights, 4 bits": "#08519c",
    "quantisation constants": "#3182bd",
    "weights, dense": "#9ecae1",
    "gathered weights": "#c6dbef",
    "adapters": "#31a354",
    "gradients": "#fd8d3c",
    "gradients in flight": "#fdbe85",
    "optimizer states": "#d94701",
    "paging window": "#a63603",
    "AdaLoRA's importances": "#fdd0a2",
    "activations": "#9e9ac8",
    "input gradients": "#54278f",
    "logits": "#dadaeb",
    "driver and libraries": "#969696",
    "process": "#969696",
    "holes in the heap": "#bdbdbd",
}
DARK = {"#08519c", "#3182bd", "#54278f", "#d94701", "#a63603", "#31a354"}
LABELLED = 0.035  # share of the tallest bar from which a part's own figure fits into it


def kinds_of(plans: Sequence[Plan]) -> list[str]:
    """Of all the plans, from the bottom of a bar to its top."""
    order = [*dict.fromkeys([*ORDER, *KINDS])]
    there = dict.fromkeys(kind for plan in plans for kind in plan.parts)
    return [*(kind for kind in order if kind in there), *(kind for kind in there if kind not in order)]


def draw(path: Path, bars: Sequence[tuple[str, Plan]], cards: Sequence[tuple[str, int]], title: str) -> None:
    """Write ``figure_of`` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = io.BytesIO()
    FigureCanvasAgg(figure_of(bars, cards, title)).print_png(picture)
    write_file(path, picture.getvalue())


def figure_of(bars: Sequence[tuple[str, Plan]], cards: Sequence[tuple[str, int]], title: str) -> Any:
    """matplotlib's figure: a bar a plan, in GB, a line a card; states that are paged out as an outline on top, and in no total.
    ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, 2.2 + 1.5 * len(bars)), 5.6), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    plans = [plan for _, plan in bars]
    top = max([*(plan.total for plan in plans), *(size for _, size in cards)]) / 1e9
    bottoms = [0.0] * len(bars)
    for kind in kinds_of(plans):
        heights = [plan.parts.get(kind, 0) / 1e9 for plan in plans]
        colour = COLOURS.get(kind, "#000000")
        axes.bar(range(len(bars)), heights, 0.62, bottoms, label=kind, color=colour, edgecolor="white", lw=0.5)
        for at, height in enumerate(heights):
            if height > LABELLED * top:
                place = (at, bottoms[at] + height / 2)
                axes.text(*place, f"{height:.1f}", ha="center", va="center", fontsize=8, color="w" if colour in DARK else "k")
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    outside = [plan.paged_out / 1e9 for plan in plans]
    if any(outside):
        outline = {"color": "none", "edgecolor": "#a63603", "hatch": "///", "lw": 0.5}
        axes.bar(range(len(bars)), outside, 0.62, bottoms, label="paged out", **outline)
    for at, plan in enumerate(plans):
        above = bottoms[at] + outside[at] + 0.012 * top
        told = {"ha": "center", "va": "bottom", "fontweight": "bold", "bbox": {"facecolor": "w", "edgecolor": "none", "pad": 1}}
        paged = f"\n+ {outside[at]:.1f} paged out" if outside[at] else ""
        axes.text(at, above, f"{plan.total / 1e9:.1f} GB{paged}", **told)
    for name, size in cards:
        axes.axhline(size / 1e9, color="#b30000", lw=1, ls="--", zorder=0)
        place = {"xytext": (3, 2), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(name, (0, size / 1e9), **place, ha="left", color="#b30000", fontsize=9)
    axes.set_xticks(range(len(bars)), [name for name, _ in bars])
    highest = max(top, *(inside + more for inside, more in zip(bottoms, outside, strict=True)))
    axes.set(ylabel="GB on one device", title=title, ylim=(0, 1.12 * highest))
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=9)
    return figure
