"""matplotlib's figures as SVG inside a page: text stays text, black follows the page's own colour, numbers are short."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from bench.sweep import plot

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
INK = "#010203"  # stands for the page's own colour of text
TICKS = (1, 16, 256, 4096)  # of m


def style() -> Any:
    """The context in which figures for a page are made."""
    import matplotlib

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "grid.color")
    return matplotlib.rc_context(STYLE | dict.fromkeys(ink, INK))


def markup(figure: Any, name: str) -> str:
    """The <svg> element. ``name`` is unlike every other figure's of the page: ids inside begin with it."""
    import matplotlib

    made = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, **STYLE}):
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
            for text in axes.texts:
                if text.get_bbox_patch() is not None:  # white behind black, on paper
                    text.get_bbox_patch().set_alpha(0)
        figure.savefig(made, format="svg", metadata={"Date": None, "Creator": None})
    text = made.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"|xmlns:\w+="[^"]*"| version="1.1"', "", text, count=4)
    text = re.sub(r"-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", text)
    text = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", text)  # but of clips and markers, which are referred to
    text = re.sub(r'(id="|#)([pm][0-9a-f]{10})', rf"\g<1>{name}-\g<2>", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's own
    text = re.sub(r'<g>\s*<path d="[^"]*" style="fill: none; opacity: 0"/>\s*</g>', "", text)  # backgrounds
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = text.replace(INK, "currentColor").replace("font: ", "font:")
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def panels(lines: Sequence[dict[str, str]], kind: str, colours: dict[str, str], name: str) -> list[str]:
    """A sweep's shapes, an <svg> each: a column of the page holds as many side by side as it has room for."""
    from matplotlib.figure import Figure

    made = []
    with style():
        for i, shape in enumerate(dict.fromkeys((line["n"], line["k"]) for line in lines)):
            figure = Figure(figsize=(3.2, 2.3), layout="constrained")
            axes = figure.add_subplot()
            plot.panel(axes, lines, shape, kind, colours, marker="")
            axes.set_ylabel(plot.KINDS[kind][2].replace(" of the run", ""))
            axes.set_xlabel("m")
            axes.set_xticks(TICKS, [str(m) for m in TICKS])
            axes.minorticks_off()
            made.append(markup(figure, f"{name}-{i}"))
    return made
