"""AdaLoRA against LoRA at equal budgets, and the matrices that AdaLoRA spends its budget on."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.papers.candidates import HEAD_RATE, Candidate
from bench.papers.run import Experiment, Line, Row
from peftk.atomic import write_file

BUDGETS = (2, 4, 8)  # ranks a matrix: LoRA's everywhere, AdaLoRA's on average at the end
RATES = {"LoRA": 4e-3, "AdaLoRA": 2e-2}
STEPS = 100

Table = dict[tuple[int, str], float]  # (layer, kind of matrix) -> rank, mean of the seeds


def kept(rows: Sequence[Row]) -> dict[float, Table]:
    """By budget the ranks that AdaLoRA ends with. ValueError for a matrix outside a numbered layer."""
    tables = {}
    for budget in dict.fromkeys(row.line.x for row in rows if row.ranks is not None):
        runs = [row.ranks for row in rows if row.ranks is not None and row.line.x == budget]
        tables[budget] = {place(path): statistics.fmean(ranks[path] for ranks in runs) for path in runs[0]}
    return tables


def place(path: str) -> tuple[int, str]:
    """``bert.encoder.layer.3.attention.self.query`` -> (3, "attention.self.query")"""
    found = re.search(r"\blayers?\.(\d+)\.(.+)$", path)
    if found is None:
        raise ValueError(f"path: expected a matrix of a numbered layer, got {path}")
    return int(found[1]), found[2]


def conclusion(rows: Sequence[Row]) -> str:
    """A table for each budget: layers down, kinds of matrices across."""
    return "\n\n".join(_table(budget, table) for budget, table in kept(rows).items())


def _table(budget: float, table: Table) -> str:
    layers, kinds = sorted({layer for layer, _ in table}), list(dict.fromkeys(kind for _, kind in table))
    head = [f"Ranks that AdaLoRA keeps of {budget:g} a matrix on average:", ""]
    head += [f"| layer | {' | '.join(kinds)} |", f"|--:{'|--:' * len(kinds)}|"]
    return "\n".join([*head, *(f"| {i} | {' | '.join(f'{table[i, kind]:.1f}' for kind in kinds)} |" for i in layers)])


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel a budget, as the paper's figure 3: layers across, kinds of matrices down, the rank as colour and number."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = kept(rows)
    layers = sorted({layer for table in tables.values() for layer, _ in table})
    kinds = list(dict.fromkeys(kind for table in tables.values() for _, kind in table))
    figure = Figure(figsize=(2.2 + 0.55 * len(layers) * len(tables), 1.4 + 0.4 * len(kinds)), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for at, (panel, (budget, table)) in enumerate(zip(panels, tables.items(), strict=True)):
        panel.imshow([[table[layer, kind] for layer in layers] for kind in kinds], cmap="Blues", aspect="auto", vmin=0)
        for (layer, kind), rank in table.items():
            facts = {
                "ha": "center",
                "va": "center",
                "fontsize": 7,
                "color": "white" if rank > max(table.values()) / 2 else "black",
            }
            panel.text(layers.index(layer), kinds.index(kind), f"{rank:.1f}", **facts)
        panel.set_xticks(range(len(layers)), layers)
        panel.set_yticks(range(len(kinds)), kinds if at == 0 else [""] * len(kinds), fontsize=7)
        panel.set(title=f"{budget:g} on average", xlabel="layer")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_file(path, picture.getvalue())


EXPERIMENT = Experiment(
    name="adalora_budget",
    title="AdaLoRA and LoRA at equal budgets",
    source="Zhang et al. 2023, section 4.1 and 4.4, table 1 and figure 3",
    lines=tuple(
        Line(f"{method}, {r} a matrix", Candidate("glosses", method, rate, STEPS, (("r", r),), head_rate=HEAD_RATE), r, method)
        for method, rate in RATES.items()
        for r in BUDGETS
    ),
    axis="ranks a matrix, on average",
    conclusion=conclusion,
    pictures={"ranks": draw},
)
