"""Which kernel takes a product with a 4-bit weight on a GPU: data, not conditions. regimes.csv has a row for each backend, GPU,
product and kind from so many rows of x on; `python -m bench --regimes --gpu --record` writes the rows of the GPU that it runs on.

backend    cuda, triton
gpu        glob on the device's name; sm_90 and the like stand for every GPU of that capability, * for all: tried in this order
product    forward: y = x W^T; backward: dx = dy W
kind       tensor: 16-bit x, k and blocks multiples of 64, aligned, a GPU that has mma for them; plain: all else
least_m    the row holds from so many rows of x on, up to the next row's
regime     few, tile, simple: a kernel that decodes W as it goes; chunks: W chunk by chunk into a workspace, torch's product
tokens     rows of x in a tile
blocks     thread blocks a multiprocessor that a product should have: the inner dimension is split until it has them
chunk_mb   of the workspace, which should stay in the L2 cache
source     calculated (bench/gpu/regimes.py) or measured
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from pathlib import Path

from peftk.ops.gpu import GpuModel

PATH = Path(__file__).with_name("regimes.csv")
DECODING = ("few", "tile", "simple")
WIDE = {  # columns of the result that a thread block makes, as the kernels have it
    ("cuda", "forward"): {"few": 32, "tile": 128, "simple": 64},
    ("cuda", "backward"): {"tile": 256, "simple": 64},
    ("triton", "forward"): {"few": 128, "tile": 128, "simple": 64},
    ("triton", "backward"): {"tile": 128, "simple": 64},
}
LEAST_DEPTH = 512  # of the inner dimension that a block should have to itself: below that its start-up shows


@dataclass(frozen=True)
class Row:
    """One of regimes.csv; the columns are told above."""

    backend: str
    gpu: str
    product: str
    kind: str
    least_m: int
    regime: str
    tokens: int
    blocks: int
    chunk_mb: int
    source: str

    def split(self, model: GpuModel, m: int, wide: int, depth: int) -> int:
        """Runs of an inner dimension of ``depth`` for an (m, wide) result."""
        if self.regime not in DECODING:
            return 1
        tiles = -(-wide // WIDE[self.backend, self.product][self.regime]) * -(-m // self.tokens)
        wanted = self.blocks * model.multiprocessors // max(tiles, 1)
        return max(1, min(wanted, depth // LEAST_DEPTH))


_forced: ContextVar[dict | None] = ContextVar("peftk_regime", default=None)


def choose(backend: str, model: GpuModel, product: str, kind: str, m: int) -> Row:
    """The row for m rows of x. RuntimeError where the table has none."""
    row = _row(backend, model, product, kind, m)
    return row if _forced.get() is None else replace(row, **_forced.get())


@lru_cache(4096)  # calls of a training loop differ in m
def _row(backend: str, model: GpuModel, product: str, kind: str, m: int) -> Row:
    rows = [row for row in table() if (row.backend, row.product, row.kind) == (backend, product, kind) and row.least_m <= m]
    generation = f"sm_{model.capability[0]}{model.capability[1]}"
    for fits in (
        lambda gpu: gpu[:3] != "sm_" and gpu != "*" and fnmatchcase(model.name, gpu),
        lambda gpu: gpu == generation,
        lambda gpu: gpu == "*",
    ):
        if found := [row for row in rows if fits(row.gpu)]:
            return max(found, key=lambda row: row.least_m)
    raise RuntimeError(f"{PATH.name}: no row for {backend} on {model.name} ({generation}), {product}, {kind}, m = {m}: add one")


@cache
def table(path: Path = PATH) -> tuple[Row, ...]:
    """The rows of a file. ValueError names a cell that can't be one."""
    with path.open(newline="") as file:
        return tuple(_read(cells, f"{path.name}, row {number}") for number, cells in enumerate(csv.DictReader(file), 2))


def _read(cells: dict[str, str], where: str) -> Row:
    values = {}
    for field in fields(Row):
        cell = cells.get(field.name)
        if cell is None or (field.type == "int" and not cell.isdecimal()):
            raise ValueError(f"{where}, {field.name}: expected {'a number' if field.type == 'int' else 'a word'}, got {cell!r}")
        values[field.name] = int(cell) if field.type == "int" else cell
    if values["regime"] not in (*DECODING, "chunks"):
        raise ValueError(f"{where}, regime: expected {', '.join(DECODING)} or chunks, got {values['regime']!r}")
    return Row(**values)


@contextlib.contextmanager
def forced(**columns: int | str) -> Iterator[None]:
    """Inside the ``with``, these columns in place of the table's: regime="chunks", tokens=64 …; for tests and measurements."""
    if unknown := set(columns) - {field.name for field in fields(Row)}:
        raise ValueError(f"columns: expected some of {', '.join(f.name for f in fields(Row))}, got {', '.join(sorted(unknown))}")
    token = _forced.set(columns)
    try:
        yield
    finally:
        _forced.reset(token)
