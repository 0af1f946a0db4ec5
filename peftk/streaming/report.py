"""The error of each layer: a summary for people, a table, a picture of how the errors spread."""

from __future__ import annotations

import csv
import io
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from peftk.atomic import write_file
from peftk.streaming.outputs import Error

logger = logging.getLogger("peftk")
_WORST = 5  # layers that the summary names
_BINS = 40


def summary(errors: Sequence[Error]) -> str:
    """A line for each kind of layer with its mean and its worst error, then the worst layers. Relative, in Frobenius norms."""
    if not errors:
        return "no layer was changed"
    groups = by_kind(errors)
    width = max(len("layers"), *(len(name) for name in groups))
    columns = [name for name in ("of_adapter", "base") if any(getattr(e, name) is not None for e in errors)]
    titles = {"of_adapter": "of adapter", "base": "base alone"}
    lines = [f"{'layers':<{width}} {'':>5} {'mean':>10} {'worst':>10}" + "".join(f" {titles[c]:>10}" for c in columns)]
    for name, group in groups.items():
        relative = [error.relative for error in group]
        line = f"{name:<{width}} {len(group):>5} {sum(relative) / len(group):>10.3e} {max(relative):>10.3e}"
        for column in columns:
            values = [value for error in group if (value := getattr(error, column)) is not None]
            line += f" {sum(values) / len(values):>10.3e}" if values else f" {'–':>10}"
        lines.append(line)
    worst = sorted(errors, key=lambda error: -error.relative)[:_WORST]
    return "\n".join([*lines, "worst: " + ", ".join(f"{error.layer} {error.relative:.3e}" for error in worst)])


def by_kind(errors: Sequence[Error]) -> dict[str, list[Error]]:
    """By the last part of a layer's path, and what it is stored as."""
    groups: dict[str, list[Error]] = defaultdict(list)
    for error in errors:
        groups[f"{error.layer.rpartition('.')[2]} ({error.kind})"].append(error)
    return dict(groups)


def write_table(path: Path, errors: Sequence[Error]) -> None:
    """CSV, a layer a row; columns as the fields of ``Error``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Error)])
    for error in errors:
        shape = "x".join(map(str, error.shape))
        numbers = (error.relative, error.largest, error.of_adapter, error.base)
        writer.writerow([error.layer, error.kind, shape, *("" if n is None else f"{n:.6g}" for n in numbers)])
    write_file(path, text.getvalue().encode())


def draw(path: Path, errors: Sequence[Error], title: str) -> None:
    """PNG: how many layers have which relative error, by kind. Without matplotlib one log line instead."""
    if find_spec("matplotlib") is None:
        logger.warning("no %s: matplotlib is not installed (pip install 'peftk[plot]')", path.name)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    groups = by_kind(errors)
    if groups:
        values = [[error.relative for error in group] for group in groups.values()]
        axes.hist(values, _BINS, stacked=True, label=list(groups), histtype="stepfilled")
        axes.legend(fontsize="small")
    axes.set(xlabel="|stored - exact| / |exact|, Frobenius", ylabel="layers", title=title)
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_file(path, picture.getvalue())
