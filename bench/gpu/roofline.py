"""A GPU's rows as a picture: what moves bytes over bytes moved, what multiplies over operations a byte, under the limits of the
same run. Needs matplotlib (``peftk[plot]``)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftk.atomic import write_file

BANDWIDTHS = {"read": "limit_read_gb_s", "write": "limit_write_gb_s", "copy": "limit_copy_gb_s"}
PEAKS = {"bf16": "limit_bf16_gflop_s", "fp16": "limit_fp16_gflop_s", "fp32": "limit_fp32_gflop_s"}
MARKERS = "osD^v<>pP*X"  # of the ops
Line = dict[str, str]


def draw(lines: Sequence[Line], folder: Path) -> Path:
    """Write roofline-<gpu>.png into ``folder``, whole or not at all. ValueError without a row that has a time."""
    timed = [line for line in lines if line["p50_ms"] and line["gb_s"]]
    if not timed:
        raise ValueError("lines: expected rows with times, got none")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"roofline-{timed[0]['machine']}.png"
    write_file(path, picture(timed))
    return path


def picture(lines: Sequence[Line]) -> bytes:
    """The PNG; a panel that would be empty is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(panel, mine) for panel in (bandwidth_panel, roofline_panel) if (mine := points(lines, panel is roofline_panel))]
    figure = Figure(figsize=(7 * len(panels), 6), layout="constrained")
    colours = {who: f"C{i}" for i, who in enumerate(dict.fromkeys(line["who"] for line in lines))}
    markers = {op: MARKERS[i % len(MARKERS)] for i, op in enumerate(dict.fromkeys(line["op"] for line in lines))}
    for i, (panel, mine) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        panel(axes, lines[0], [x for x, _, _ in mine])
        for x, y, line in mine:
            axes.plot(x, y, markers[line["op"]], color=colours[line["who"]], markersize=5, alpha=0.8)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small", loc="lower right")
    first = lines[0]
    clocks = ", ".join(dict.fromkeys(line["sm_clock_mhz"] for line in lines))
    conditions = f"driver {first['driver']}, SM clock {clocks} MHz, power cap {first['power_cap_w']} W"
    figure.suptitle(f"{first['machine']}, {first['isa']}, {conditions}, commit {first['commit']}", fontsize="small")
    keys = [*((who, "o", colour) for who, colour in colours.items()), *((op, marker, "grey") for op, marker in markers.items())]
    handles = [figure.axes[0].plot([], [], marker, color=colour)[0] for _, marker, colour in keys]
    figure.legend(handles, [name for name, _, _ in keys], loc="outside lower center", ncols=4, fontsize="small")
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def points(lines: Sequence[Line], multiplies: bool) -> list[tuple[float, float, Line]]:
    """(MB moved, GB/s) of what only moves bytes, or (FLOP a byte, GFLOP/s) of what multiplies; each with its row."""
    if multiplies:
        return [(float(ln["gflop_s"]) / float(ln["gb_s"]), float(ln["gflop_s"]), ln) for ln in lines if ln["gflop_s"]]
    return [(float(ln["gb_s"]) * float(ln["p50_ms"]), float(ln["gb_s"]), ln) for ln in lines if not ln["gflop_s"]]


def bandwidth_panel(axes: Any, limits: Line, xs: Sequence[float]) -> None:
    """The measured bandwidths as lines across."""
    for name, column in BANDWIDTHS.items():
        rate = float(limits[column])
        axes.axhline(
            rate, color="black", linestyle={"read": "-", "write": "--", "copy": ":"}[name], label=f"{name} {rate:.4g} GB/s"
        )
    axes.set(xscale="log", yscale="log", xlabel="MB moved by a call", ylabel="GB/s", title="memory")


def roofline_panel(axes: Any, limits: Line, xs: Sequence[float]) -> None:
    """Copy bandwidth times intensity, up to torch.matmul's peak for each dtype."""
    slope = float(limits[BANDWIDTHS["copy"]])
    for (name, column), style in zip(PEAKS.items(), ("-", "--", ":"), strict=True):
        peak = float(limits[column])
        corner = peak / slope
        ends = sorted({min(*xs, corner) / 2, corner, max(*xs, corner) * 2})
        axes.plot(ends, [min(slope * x, peak) for x in ends], color="black", linestyle=style, label=f"{name} {peak:.0f} GFLOP/s")
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="GFLOP/s", title="products")
