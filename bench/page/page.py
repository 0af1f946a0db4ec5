"""The page: sections out of bench/results and bench/papers/results, through one template."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import memory_plan, pictures, report
from bench.page import results, svg
from bench.papers import record, seven_methods
from bench.sweep import plot
from peftk import planner
from peftk.atomic import write_file
from peftk.cli import memory
from peftk.cli.errors import require

TEMPLATE = Path(__file__).parent / "page.html"
Line = dict[str, str]


def write(path: Path, folder: Path = report.RESULTS) -> Path:
    """Write the page; an earlier one stays whole until it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, html(folder).encode())
    return path


def html(folder: Path = report.RESULTS) -> str:
    """The whole page. UserError names the extra without jinja2 (torch brings it) or matplotlib."""
    require("matplotlib", "plot")
    jinja2 = require("jinja2", "plot")
    loader = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return loader.from_string(TEMPLATE.read_text()).render(facts(folder))


def facts(folder: Path) -> dict[str, Any]:
    """What the template asks for."""
    found = results.cases(folder)
    machines = [
        {
            "name": name,
            "benches": group([case for case in found if case.machine == name]),
            "goals": results.verdicts([case for case in found if case.machine == name]),
            "stamps": list(dict.fromkeys(case.stamp for case in found if case.machine == name)),
        }
        for name in dict.fromkeys(case.machine for case in found)
    ]
    return {
        "verdicts": results.verdicts,
        "date": datetime.date.today().isoformat(),
        "commit": report.Provenance.here().commit,
        "goals": results.verdicts(found),
        "machines": machines,
        "losses": results.losses(found),
        "missed": results.missed(found),
        "compared": sum(peer.ratio is not None for case in found for peer in case.peers),
        "sweeps": [sweep_of(lines, f"s{i}") for i, lines in enumerate(pictures.sweeps(folder))],
        "methods": methods(),
        "memory": memory_of(folder / memory_plan.PATH.name),
        "gates": results.gates(folder / "static.csv"),
    }


def group(found: Sequence[results.Case]) -> list[tuple[str, list[results.Case]]]:
    """By bench, in order of their names."""
    names = sorted({case.op for case in found})
    return [(name, [case for case in found if case.op == name]) for name in names]


def sweep_of(lines: Sequence[Line], name: str) -> dict[str, Any]:
    """A panel a shape, for each pass time and share; and in how many points ours is faster."""
    passes = []
    for i, what in enumerate(dict.fromkeys(line["pass"] for line in lines)):
        mine = [line for line in lines if line["pass"] == what]
        colours = plot.colours_of(mine)
        panels = {kind: svg.panels(mine, kind, colours, f"{name}{i}{kind[0]}") for kind in plot.KINDS}
        passes.append({"name": what, "panels": panels, "legend": legend(colours), "standing": results.standing(mine)})
    return {"passes": passes, "stamp": report.stamp(lines[0]), "machine": lines[0]["machine"], "isa": lines[0]["isa"]}


def legend(colours: dict[str, str]) -> list[tuple[str, str]]:
    """(name, CSS colour) of matplotlib's C0, C1 …"""
    from matplotlib.colors import to_hex

    return [(who, to_hex(colour)) for who, colour in colours.items()]


def methods(folder: Path = record.RESULTS) -> dict[str, Any] | None:
    """The README's table of methods; None where it isn't recorded."""
    path = folder / f"{seven_methods.EXPERIMENT.name}.csv"
    if not path.exists():
        return None
    rows = record.read(path)
    return {"header": seven_methods.header(rows), "lines": seven_methods.cells(rows), "stamp": seven_methods.stamp(rows)}


def memory_of(path: Path) -> dict[str, Any]:
    """Predictions beside what was measured, and the pictures of both."""
    rows = memory_plan.read(path) if path.exists() else []
    lines = [
        {
            "case": f"{row['model']}, {row['method']}, {row['base']} base",
            "step": f"{row['batch']} x {row['length']}" + (", checkpointing" if row["checkpointing"] == "True" else ""),
            "malloc": row["malloc"],
            "predicted": f"{float(row['predicted']) / 1e6:.0f} MB",
            "measured": f"{float(row['measured']) / 1e6:.0f} MB",
            "off": f"{float(row['ratio']) - 1:+.1%}",
            "met": row["met"],
        }
        for row in rows
    ]
    with svg.style():
        over_size = svg.markup(pictures.memory_figure(rows, (6.4, 4.0)), "size")
        bars = planner.picture.figure_of(memory.qlora_bars(), memory.QLORA_CARDS, memory.QLORA_TITLE)
    stamps = dict.fromkeys(f"{row['date']}, commit {row['commit']}: {row['machine']}, torch {row['torch']}" for row in rows)
    return {"lines": lines, "over_size": over_size, "bars": svg.markup(bars, "bars"), "stamps": list(stamps)}
