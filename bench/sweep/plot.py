"""A sweep as pictures: time over m and share of the limit over m, a panel a shape. Needs matplotlib (``peftk[plot]``)."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftk.atomic import write_file

COLUMNS_OF_PANELS = 4
KINDS = {"time": ("p50_ms", 1.0, "ms", "log"), "share": ("share", 100.0, "% of the limit of the run", "linear")}


def draw(lines: Sequence[dict[str, str]], folder: Path, prefix: str = "sweep") -> list[Path]:
    """Write <prefix>-<pass>-<kind>.png into ``folder``, each whole or not at all; returns them. ValueError without a point."""
    if not lines:
        raise ValueError("lines: expected the points of a sweep, got none")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for what in dict.fromkeys(line["pass"] for line in lines):
        for kind in KINDS:
            path = folder / f"{prefix}-{re.sub(r'[^a-z0-9_]+', '-', what.lower())}-{kind}.png"
            write_file(path, picture([line for line in lines if line["pass"] == what], kind))
            written.append(path)
    return written


def picture(lines: Sequence[dict[str, str]], kind: str) -> bytes:
    """The PNG of one pass."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((line["n"], line["k"]) for line in lines))
    across = min(COLUMNS_OF_PANELS, len(shapes))
    down = -(-len(shapes) // across)
    figure = Figure(figsize=(4 * across, 3.2 * down + 0.8), layout="constrained")
    colours = colours_of(lines)
    drawn: dict[str, object] = {}
    for i, shape in enumerate(shapes):
        axes = figure.add_subplot(down, across, i + 1)
        drawn |= panel(axes, lines, shape, kind, colours)
        if i % across == 0:
            axes.set_ylabel(KINDS[kind][2])
        if i >= len(shapes) - across:
            axes.set_xlabel("m (rows of x)")
    first = lines[0]
    figure.suptitle(
        f"{first['pass']}, bf16, {first['machine']}, {first['threads']} threads, {first['isa']}, commit {first['commit']}"
    )
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn))
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def colours_of(lines: Sequence[dict[str, str]]) -> dict[str, str]:
    """A colour for each candidate."""
    return {who: f"C{i}" for i, who in enumerate(dict.fromkeys(line["who"] for line in lines))}


def panel(
    axes: Any, lines: Sequence[dict[str, str]], shape: tuple[str, str], kind: str, colours: dict[str, str], marker: str = "."
) -> dict[str, Any]:
    """One shape: a curve a candidate; the curves by name."""
    column, factor, _, scale = KINDS[kind]
    drawn = {}
    for who, colour in colours.items():
        points = series(lines, shape, who, column, factor)
        if points:
            (drawn[who],) = axes.plot(*zip(*points, strict=True), marker=marker, color=colour)
    axes.set(title="x".join(shape), yscale=scale)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    return drawn


def series(
    lines: Sequence[dict[str, str]], shape: tuple[str, str], who: str, column: str, factor: float
) -> list[tuple[int, float]]:
    """(m, figure) of one candidate on one shape, by m; points without the figure are left out."""
    mine = [line for line in lines if (line["n"], line["k"]) == shape and line["who"] == who and line[column]]
    return sorted((int(line["m"]), float(line[column]) * factor) for line in mine)
