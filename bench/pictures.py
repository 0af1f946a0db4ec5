"""Pictures out of rows: time and share of the limit over m, memory over a model's size. Needs matplotlib (``peftk[plot]``)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import memory_plan, report
from bench.sweep import plot
from peftk import planner
from peftk.atomic import write_file
from peftk.cli import memory

README_FOLDER = report.RESULTS / "pictures"
FEWEST = 3  # values of m that make a curve
CASE = re.compile(r"m=(\d+), bf16, (.*?)(\d+)x(\d+), (.*)")
Line = dict[str, str]

# Memory over size: models from small to large, and what is done to them.
MODELS = {"smollm2-135m": 0.135, "tinyllama-1.1b": 1.1, "llama-7b": 6.7, "llama-13b": 13.0, "llama-33b": 32.5, "llama-65b": 65.2}
TRAININGS = {("full", "dense"): "full, bf16", ("lora", "dense"): "LoRA, bf16", ("qlora", "nf4"): "QLoRA"}
LENGTH = 256  # tokens, one sequence, gradient checkpointing
SIZES = {"16 GB": 16, "64 GB": 64, "256 GB": 256}


def draw(rows: Sequence[Line], sweeps: Iterable[Sequence[Line]], folder: Path) -> list[Path]:
    """Write every picture that rows and sweeps have the points for, and memory over size; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for lines in sweeps:
        if lines:
            written += plot.draw(lines, folder, f"sweep-{lines[0]['machine']}-{lines[0]['isa']}")
    for where, lines in over_m(rows).items():
        written += plot.draw(lines, folder, "-".join(("m", *where)))
    path = folder / "memory-over-size.png"
    write_file(path, png(memory_figure(memory_plan.read())))
    return [*written, path]


def of_readme(folder: Path = README_FOLDER) -> list[Path]:
    """Write the pictures that the README shows; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    size, figure = folder / "memory-over-size.png", folder / "qlora-memory.png"
    write_file(size, png(memory_figure(memory_plan.read())))
    planner.picture.draw(figure, memory.qlora_bars(), memory.QLORA_CARDS, memory.QLORA_TITLE)
    return [size, figure]


def sweeps(folder: Path = report.RESULTS) -> list[list[Line]]:
    """Every recorded one."""
    from bench.sweep import sweep

    return [sweep.read(path) for path in sorted(folder.glob("*-sweep*.csv"))]


def over_m(rows: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    """By machine and instruction set: the newest bf16 rows whose case is of some m, as a sweep's lines; its ``pass`` is the bench
    with the rest of the case."""
    found: dict[tuple[str, str], dict[tuple[str, ...], list[Line]]] = {}
    for run in report.newest_runs(rows):
        if match := CASE.fullmatch(run[0]["case"]):
            m, before, n, k, after = match.groups()
            name = f"{run[0]['op']}, {before}{after}"
            curves = found.setdefault((run[0]["machine"], run[0]["isa"]), {})
            curves.setdefault((name, n, k), []).extend(row | {"m": m, "n": n, "k": k, "pass": name} for row in run)
    chosen = {}
    for where, curves in found.items():
        lines = [ln for curve in curves.values() if len({ln["m"] for ln in curve}) >= FEWEST for ln in curve]
        if lines:
            chosen[where] = lines
    return chosen


def predictions() -> dict[str, list[planner.Plan]]:
    """By training of TRAININGS, a plan for each of MODELS: on a CPU, a sequence of LENGTH tokens, gradient checkpointing."""
    return {
        told: [memory_plan.predicted(memory_plan.row(model, *training, 1, LENGTH, True)) for model in MODELS]
        for training, told in TRAININGS.items()
    }


def memory_figure(measured: Sequence[Line], size: tuple[float, float] = (7.2, 4.6)) -> Any:
    """Predicted as lines, measured as points on them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for i, ((training, told), plans) in enumerate(zip(TRAININGS.items(), predictions().values(), strict=True)):
        axes.plot(list(MODELS.values()), [plan.total / 1e9 for plan in plans], color=f"C{i}", lw=1.5, label=f"{told}, predicted")
        points = [(MODELS[row["model"]], float(row["measured"]) / 1e9) for row in measured if _is_on_line(row, training)]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=f"C{i}", label=f"{told}, measured")
    for name, gigabytes in SIZES.items():
        axes.axhline(gigabytes, color="#888888", lw=0.8, ls=":")
        axes.annotate(
            name, (0, gigabytes), xytext=(3, 2), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8
        )
    axes.set(xscale="log", yscale="log", xlabel="parameters (billions)", ylabel="peak memory of a training step (GB)")
    axes.set_xticks(list(MODELS.values()), [f"{size:g}" for size in MODELS.values()])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _is_on_line(row: Line, training: tuple[str, str]) -> bool:
    asked = {"batch": "1", "length": str(LENGTH), "checkpointing": "True", "malloc": memory_plan.GIVEN_BACK}
    return (row["method"], row["base"]) == training and all(row[name] == value for name, value in asked.items())


def png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    made = io.BytesIO()
    figure.set_dpi(110)
    FigureCanvasAgg(figure).print_png(made, metadata={"Software": None})
    return made.getvalue()
