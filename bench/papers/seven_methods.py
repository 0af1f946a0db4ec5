"""The seven methods, DoRA and full fine-tuning on the same task with the same steps; the README's table of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.papers import record
from bench.papers.candidates import HEAD_RATE, Candidate
from bench.papers.run import Experiment, Line
from bench.report import ROOT, rewrite_between

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
PAGE_BEGIN, PAGE_END = "<!-- record:begin -->", "<!-- record:end -->"
PAGES = {  # in peftk/methods/pages/
    "lora": "LoRA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "qlora": "QLoRA",
    "prefix_tuning": "Prefix Tuning",
    "prompt_tuning": "Prompt Tuning",
    "p_tuning": "P-Tuning v1",
    "p_tuning_v2": "P-Tuning v2",
}
TASK, STEPS, R, N = "glosses", 60, 8, 16


def _line(name: str, method: str, rate: float, **options: Any) -> Line:
    return Line(name, Candidate(TASK, method, rate, STEPS, tuple(options.items()), head_rate=HEAD_RATE))


EXPERIMENT = Experiment(
    name="seven_methods",
    title="Seven methods, DoRA and full fine-tuning",
    source="Hu et al. 2021, table 2 (adapters against full fine-tuning of an encoder), with the methods that came later",
    lines=(
        _line("head only", "own parameters", HEAD_RATE, head_only=True),
        _line("LoRA", "LoRA", 4e-3, r=R),
        _line("DoRA", "LoRA", 4e-3, r=R, dora=True),
        _line("AdaLoRA", "AdaLoRA", 2e-2, r=R),
        _line("QLoRA", "QLoRA", 4e-3, r=R),
        _line("Prefix Tuning", "prefix tuning", 1e-3, n=N, mlp=True),
        _line("Prompt Tuning", "prompt tuning", 5e-2, n=N),
        _line("P-Tuning v1", "P-Tuning in front", 5e-4, n=N, encoder="LSTM"),
        _line("P-Tuning v2", "P-Tuning v2", 5e-2, n=N),
        _line("full fine-tuning", "own parameters", 2e-4),
    ),
)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Of a CSV's rows: a line a method, and where the figures come from. ValueError where there are none."""
    if not rows:
        raise ValueError("rows: expected runs of the methods, got none")
    lines = [f"| {' | '.join(header(rows))} |", "|---|--:|--:|--:|--:|--:|", *(f"| {' | '.join(line)} |" for line in cells(rows))]
    return "\n".join([*lines, "", stamp(rows)])


def header(rows: Sequence[dict[str, str]]) -> tuple[str, ...]:
    """The table's columns."""
    return "method", "trained parameters", "s a step", rows[0]["metric"], "steps", "rate"


def cells(rows: Sequence[dict[str, str]]) -> list[tuple[str, ...]]:
    """A line a method."""
    lines = []
    for name in dict.fromkeys(row["line"] for row in rows):
        parameters, seconds, score, first_run = _figures(rows, name)
        lines.append((name, parameters, seconds, score, first_run["steps"], first_run["rate"]))
    return lines


def stamp(rows: Sequence[dict[str, str]]) -> str:
    """Where the figures come from."""
    first, seeds = rows[0], {row["seed"] for row in rows}
    spread = f"{len(seeds)} seeds, mean ± standard deviation; the head learns at {first['head_rate']}"
    return f"Task `{first['task']}` (bench/papers), {spread}. {_where(first)}."


def page_record(rows: Sequence[dict[str, str]], name: str) -> str:
    """What a method's page says of it, beside full fine-tuning."""
    first, told = rows[0], []
    for line in (name, "full fine-tuning"):
        parameters, seconds, score, _ = _figures(rows, line)
        told.append(f"{line}: {parameters} trained parameters with the head, {seconds} s a step, {first['metric']} {score}")
    where = "[bench/papers](../../../bench/papers/README.md), `seven_methods`"
    what = f"MiniLM on `{first['task']}`, {first['steps']} steps ({where})"
    return "\n".join([f"**On record.** {what}.", *(f"{line};" for line in told), f"{_where(first)}."])


def _figures(rows: Sequence[dict[str, str]], name: str) -> tuple[str, str, str, dict[str, str]]:
    """Parameters, seconds a step, score, and the first run of a line. ValueError where there is none."""
    runs = [row for row in rows if row["line"] == name]
    if not runs:
        raise ValueError(f"rows: expected runs of {name!r}, got {', '.join(dict.fromkeys(row['line'] for row in rows))}")
    seconds = statistics.median(float(row["step_ms"]) for row in runs) / 1e3
    score = record.spread([float(row["score"]) for row in runs])
    return f"{int(runs[0]['parameters']):,}", f"{seconds:.3f}", score, runs[0]


def _where(row: dict[str, str]) -> str:
    origin = ", ".join(f"{name} {row[name]}" for name in ("peftk", "torch"))
    return f"{row['machine']}, {row['threads']} threads; {origin}; commit {row['commit']}, {row['date']}"


def write_readme(results: Path = record.RESULTS, readme: Path = ROOT / "README.md") -> None:
    """Put the table of the recorded runs between the README's markers. OSError where no run is recorded, ValueError where the
    markers are missing."""
    rewrite_between(readme, BEGIN, END, table(record.read(results / f"{EXPERIMENT.name}.csv")))


def write_pages(results: Path = record.RESULTS, folder: Path = ROOT / "peftk" / "methods" / "pages") -> None:
    """Put each method's recorded runs between the markers of its page. Errors as write_readme's."""
    rows = record.read(results / f"{EXPERIMENT.name}.csv")
    for page, name in PAGES.items():
        rewrite_between(folder / f"{page}.md", PAGE_BEGIN, PAGE_END, page_record(rows, name))
