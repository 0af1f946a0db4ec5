"""regimes.csv and the choice that is made by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftk.ops import regimes
from peftk.ops.gpu import GpuModel

A100 = GpuModel("NVIDIA A100-SXM4-80GB", (8, 0), 108)
UNKNOWN = GpuModel("NVIDIA Something New", (13, 0), 200)
HEADER = "backend,gpu,product,kind,least_m,regime,tokens,blocks,chunk_mb,source\n"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """table(text) puts these rows in the place of the package's."""

    def put(text: str) -> None:
        path = tmp_path / "regimes.csv"
        path.write_text(HEADER + text)
        rows = regimes.table(path)
        monkeypatch.setattr(regimes, "table", lambda: rows)
        regimes._row.cache_clear()

    yield put
    regimes._row.cache_clear()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("product", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["tensor", "plain"])
@pytest.mark.parametrize("model", [A100, UNKNOWN, GpuModel("Tesla T4", (7, 5), 40)])
def test_every_call_has_a_row(backend, product, kind, model):
    for m in (0, 1, 8, 9, 16, 17, 64, 65, 1024, 1025, 10**6):
        row = regimes.choose(backend, model, product, kind, m)
        assert row.least_m <= m
        if row.regime == "few":
            assert m <= 8 and product == "forward" and kind == "tensor", "few rows is what that kernel takes"
        if row.regime == "chunks":
            assert row.chunk_mb >= 1
        else:
            assert row.tokens in (8, 16, 32, 64, 128) and row.blocks >= 1
        if kind == "plain":
            assert row.regime in ("simple", "chunks")


def test_a_gpus_own_rows_come_before_its_generations_and_all_others(table):
    rows = ["*,forward,tensor,0,tile,16", "sm_80,forward,tensor,0,tile,32", "*A100*,forward,tensor,0,tile,64"]
    table("".join(f"cuda,{row},1,8,calculated\n" for row in (*rows, "*A100*,forward,tensor,100,chunks,0")))
    chosen = lambda model, m=1: regimes.choose("cuda", model, "forward", "tensor", m)  # noqa: E731
    assert chosen(A100).tokens == 64
    assert chosen(A100, 99).regime == "tile" and chosen(A100, 100).regime == "chunks"
    assert chosen(GpuModel("NVIDIA A30", (8, 0), 56)).tokens == 32
    assert chosen(UNKNOWN).tokens == 16


def test_a_missing_row_is_told(table):
    table("cuda,*,forward,tensor,9,tile,16,1,0,calculated\n")
    with pytest.raises(RuntimeError, match=r"no row for cuda on NVIDIA A100-SXM4-80GB \(sm_80\), forward, tensor, m = 8"):
        regimes.choose("cuda", A100, "forward", "tensor", 8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("cuda,*,forward,tensor,few,tile,16,1,0,x", "row 2, least_m: expected a number, got 'few'"),
        ("cuda,*,forward,tensor,0,fast,16,1,0,x", "regime: expected few, tile, simple or chunks, got 'fast'"),
        ("cuda,*,forward", "row 2, kind: expected a word, got None"),
    ],
)
def test_bad_cells_are_named(tmp_path, row, message):
    path = tmp_path / "bad.csv"
    path.write_text(HEADER + row + "\n")
    with pytest.raises(ValueError, match=message):
        regimes.table(path)


def test_splits_fill_the_gpu_but_leave_each_block_some_depth():
    row = regimes.Row("cuda", "*", "forward", "tensor", 9, "tile", 64, 2, 0, "calculated")
    assert row.split(A100, 64, 4096, 14336) == 6, "32 tiles, 216 wanted"
    assert row.split(A100, 64, 4096, 2048) == 2048 // regimes.LEAST_DEPTH
    assert row.split(A100, 64, 4096, 64) == 1
    assert row.split(A100, 4096, 4096, 14336) == 1
    chunks = regimes.Row("cuda", "*", "forward", "tensor", 9, "chunks", 0, 0, 16, "calculated")
    assert chunks.split(A100, 64, 4096, 14336) == 1


def test_forced_columns():
    with regimes.forced(regime="chunks", chunk_mb=2):
        row = regimes.choose("cuda", A100, "forward", "tensor", 1)
        assert (row.regime, row.chunk_mb) == ("chunks", 2)
    assert regimes.choose("cuda", A100, "forward", "tensor", 1).regime == "few"
    with pytest.raises(ValueError, match="columns: expected some of backend, .* got speed"), regimes.forced(speed=1):
        pass
