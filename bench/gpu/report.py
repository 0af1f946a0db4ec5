"""Rows in bench/results/<gpu>.csv: bench/report.py's columns, and what figures of a GPU depend on besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import report
from bench.gpu.device import Device
from bench.gpu.limits import GpuLimits
from bench.gpu.measure import Measured

FACTS = ("triton", "cuda", "driver", "power_cap_w", "max_sm_clock_mhz")  # of the machine
OWN = ("sm_clock_mhz", "spread", "limit_fp16_gflop_s", "limit_launch_us", "limit_launch_in_graph_us")
COLUMNS = (*report.COLUMNS, *FACTS, *OWN)


@dataclass(frozen=True)
class Provenance(report.Provenance):
    """Where a GPU's figures come from."""

    facts: dict[str, str]

    @classmethod
    def of(cls, device: Device) -> Provenance:
        here = report.Provenance.here()
        facts = {"triton": report.version_of("triton")} | device.facts()
        return cls(here.date, here.commit, device.name, here.threads, device.isa, here.versions, facts)

    def cells(self) -> dict[str, str]:
        return super().cells() | self.facts

    def __str__(self) -> str:
        return f"{super().__str__()}; {', '.join(f'{name} {value}' for name, value in self.facts.items())}"


def record(
    op: str, measured: Sequence[Measured], limits: GpuLimits, provenance: Provenance, folder: Path = report.RESULTS
) -> Path:
    """Add the rows to the GPU's file, which appears whole. ValueError where it has other columns."""
    path = folder / f"{provenance.machine}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    before = report.read(path, (COLUMNS,)) if path.exists() else []
    report.write_csv(path, COLUMNS, [*before, *lines(op, measured, limits, provenance)])
    return path


def lines(op: str, measured: Sequence[Measured], limits: GpuLimits, provenance: Provenance) -> list[dict[str, str]]:
    """The rows of a file."""
    common = (
        provenance.cells()
        | report.limit_cells(limits)
        | {
            "limit_fp16_gflop_s": report.number(limits.matmul[torch.float16], 1e-9),
            "limit_launch_us": report.number(limits.launch, 1e6),
            "limit_launch_in_graph_us": report.number(limits.launch_in_graph, 1e6),
        }
    )
    return [
        common
        | report.row_cells(op, row)
        | {"sm_clock_mhz": case.sm_clock_mhz, "spread": report.number(case.spreads.get(row.who))}
        for case in measured
        for row in case.rows
    ]
