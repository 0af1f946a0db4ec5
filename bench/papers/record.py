"""What runs came to: a CSV with every run, a markdown table and a plot with mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import report
from bench.papers.run import Experiment, Row
from bench.report import Provenance, number, write_csv
from peftk.atomic import write_file

WHERE = ("date", "commit", "machine", "threads", "torch", "peftk")
FIGURES = ("experiment", "task", "line", "x", "seed", "metric", "score", "train_loss", "parameters", "steps", "rate", "seconds")
FIRST_COLUMNS = (*WHERE, *FIGURES)  # of the files before step_ms came, and head_rate
SECOND_COLUMNS = (*FIRST_COLUMNS, "step_ms")
COLUMNS = (*SECOND_COLUMNS, "head_rate")
RESULTS = Path(__file__).parent / "results"


def write(experiment: Experiment, rows: Sequence[Row], provenance: Provenance, folder: Path = RESULTS) -> list[Path]:
    """``<experiment>.csv``, ``.md``, ``.png`` and its further pictures in ``folder``, in place of older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / experiment.name
    where = {name: cell for name, cell in provenance.cells().items() if name in WHERE}
    write_csv(base.with_suffix(".csv"), COLUMNS, [where | cells(experiment, row) for row in rows])
    write_file(base.with_suffix(".md"), markdown(experiment, rows, provenance).encode())
    plot(experiment, rows, base.with_suffix(".png"))
    further = [folder / f"{experiment.name}_{key}.png" for key in experiment.pictures]
    for path, draw in zip(further, experiment.pictures.values(), strict=True):
        draw(rows, path)
    return [*(base.with_suffix(suffix) for suffix in (".csv", ".md", ".png")), *further]


def cells(experiment: Experiment, row: Row) -> dict[str, str]:
    """A run's own columns."""
    candidate = row.line.candidate
    return {
        "experiment": experiment.name,
        "task": candidate.task,
        "line": row.line.name,
        "x": number(row.line.x),
        "seed": str(row.seed),
        "metric": row.metric,
        "score": number(row.score),
        "train_loss": number(row.loss),
        "parameters": str(row.parameters),
        "steps": str(candidate.steps if row.loss is not None else 0),
        "rate": number(candidate.rate),
        "seconds": f"{row.seconds:.1f}",
        "step_ms": number(row.step_seconds, 1e3),
        "head_rate": number(candidate.head_rate),
    }


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV. ValueError where its columns are others."""
    return report.read(path, (COLUMNS, SECOND_COLUMNS, FIRST_COLUMNS))


def spread(scores: Sequence[float]) -> str:
    """``mean ± standard deviation``; of one score itself."""
    mean = f"{statistics.fmean(scores):.3f}"
    return mean if len(scores) < 2 else f"{mean} ± {statistics.stdev(scores):.3f}"


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """By task, metric and line's name, in order."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.line.candidate.task, row.metric, row.line.name), []).append(row)
    return groups


def markdown(experiment: Experiment, rows: Sequence[Row], provenance: Provenance) -> str:
    """The experiment's table, with where it comes from."""
    lines = [
        f"### {experiment.title}",
        "",
        f"After {experiment.source}. {len({row.seed for row in rows})} seeds: mean ± standard deviation.",
        "",
        "| task | | score | seeds, one by one | trained | steps | rate | seconds a run |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for (task, metric, name), group in grouped(rows).items():
        candidate, first = group[0].line.candidate, group[0]
        each = ", ".join(f"{row.score:.3f}" for row in group)
        rate = f"{candidate.rate:g}" + (f", head {candidate.head_rate:g}" if candidate.head_rate is not None else "")
        trained = (f"{first.parameters:,}", candidate.steps, rate) if first.loss is not None else (0, 0, "–")
        seconds = statistics.fmean(row.seconds for row in group)
        told = (f"`{task}`, {metric}", name, spread([row.score for row in group]), each, *trained, f"{seconds:.0f}")
        lines.append("| " + " | ".join(map(str, told)) + " |")
    if experiment.conclusion is not None:
        lines += ["", experiment.conclusion(rows)]
    return "\n".join([*lines, "", f"{provenance}.", ""])


def plot(experiment: Experiment, rows: Sequence[Row], path: Path) -> None:
    """Mean and spread: over the axis where there is one, else a bar a line; a panel a task."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = grouped(rows)
    panels = list(dict.fromkeys((task, metric) for task, metric, _ in groups))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        shown = {name: group for (*of, name), group in groups.items() if tuple(of) == panel}
        means = [statistics.fmean(row.score for row in group) for group in shown.values()]
        errors = [statistics.stdev(row.score for row in group) if len(group) > 1 else 0.0 for group in shown.values()]
        if experiment.axis is None:
            axis.barh(range(len(shown)), means, xerr=errors, capsize=3, color="#6f8fb5")
            axis.set_yticks(range(len(shown)), list(shown))
            axis.invert_yaxis()
            axis.set_xlabel(panel[1])
        else:
            firsts = [group[0].line for group in shown.values()]
            for curve in dict.fromkeys(line.curve for line in firsts):
                points = [point for point in zip(firsts, means, errors, strict=True) if point[0].curve == curve]
                heights, bars = [point[1] for point in points], [point[2] for point in points]
                axis.errorbar([point[0].x for point in points], heights, yerr=bars, marker="o", capsize=3, label=curve)
            if firsts[0].curve:
                axis.legend(fontsize=7)
            axis.set_xscale("log", base=2)
            axis.set_xlabel(experiment.axis)
            axis.set_ylabel(panel[1])
        axis.set_title(panel[0])
    figure.suptitle(experiment.title)
    figure.tight_layout()
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=80, metadata={"Software": None})
    pyplot.close(figure)
    write_file(path, made.getvalue())
