"""long_runs.csv: the last result of each long check, with its machine and commit."""

from __future__ import annotations

import csv
import datetime
import io
from pathlib import Path

from bench.report import commit_name, machine_name
from peftk.atomic import write_file

RESULTS = Path(__file__).with_name("long_runs.csv")
COLUMNS = ("check", "what", "result", "held", "minutes", "date", "commit", "machine")


def record(check: str, what: str, result: str, held: bool, seconds: float) -> None:
    """Write a row in the place of the same check's of the same thing, and print it."""
    row = {
        "check": check, "what": what, "result": result, "held": "yes" if held else "no", "minutes": f"{seconds / 60:.1f}",
        "date": datetime.date.today().isoformat(), "commit": commit_name(), "machine": machine_name(),
    }  # fmt: skip
    rows = [*(old for old in read() if (old["check"], old["what"]) != (check, what)), row]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: (row["check"], row["what"])))
    write_file(RESULTS, text.getvalue().encode())
    print(f"{check}, {what}: {result}: {'held' if held else 'NOT held'}")


def read() -> list[dict[str, str]]:
    """Every row."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))
