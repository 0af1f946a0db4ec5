"""bench/models/bench_transformers.py on a tiny model: every candidate does its load and its steps, and goals are judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.goals import Goal, MemoryGoal
from bench.limits import Limits
from bench.models import bench_transformers as bench
from peftk.nn import NF4Linear

LIMITS = Limits(1e9, 1e9, 1e9, {torch.bfloat16: 1e9, torch.float32: 1e9})
transformers = pytest.importorskip("transformers")
for package in ("peft", "bitsandbytes", "accelerate"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64, initializer_range=0.1)
    return bench.write_folders(transformers.LlamaForCausalLM(config), tmp_path_factory.mktemp("folders"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_every_load(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    """In this process: one of its own takes seconds to start."""
    dense, stored = folders
    kinds = {}
    for who in (*bench.LOADS, *bench.STORED_LOADS):
        folder = dense if who in bench.LOADS else stored
        seconds, _ = bench.measured_load(who, folder)
        kinds[who] = type(bench.load(who, folder).model.layers[0].mlp.up_proj).__name__
        assert seconds > 0
    assert kinds == {
        bench.OURS: "NF4Linear",
        bench.THEIRS: "Linear4bit",
        bench.DENSE: "Linear",
        bench.OURS_STORED: "NF4Linear",
        bench.THEIRS_STORED: "Linear4bit",
    }
    taken = {bench.OURS: [(1.0, 60), (3.0, 60)], bench.THEIRS: [(2.0, 80), (4.0, 120)], bench.DENSE: [(1.0, 200), (1.0, 200)]}
    monkeypatch.setattr(bench, "in_a_process", lambda who, folder: taken[who].pop())
    times, memory = bench.loading("load", bench.LOADS, dense, 2, (Goal(bench.THEIRS, 1), MemoryGoal(bench.THEIRS, 0.5)), LIMITS)
    assert [row.p50 for row in times] == [2.0, 3.0, 1.0] and [row.extra for row in memory] == [60, 100, 200]
    assert (times[0].verdicts[0].met, memory[0].verdicts[0].met) == (True, False)
    assert str(memory[0].verdicts[0]) == "<= 0.5x the memory of load_in_4bit: missed (0.60x)"


@pytest.mark.full
def test_a_process_of_its_own(folders: tuple[Path, Path]):
    assert bench.in_a_process(bench.OURS_STORED, folders[1])[0] > 0
    with pytest.raises(RuntimeError, match="loading with dense bf16: "):
        bench.in_a_process(bench.DENSE, folders[0] / "nowhere")


def test_both_trainers_train_the_same(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    _, stored = folders
    batches = list(torch.randint(0, 64, (2, 4, 16), generator=torch.Generator().manual_seed(1)))
    fused, original = [], NF4Linear.forward_low_rank
    monkeypatch.setattr(NF4Linear, "forward_low_rank", lambda *a, **k: fused.append(1) or original(*a, **k))
    everyone, losses = bench.trainers(stored, batches)
    calls = []
    for candidate in everyone:
        candidate.run()
        calls.append(len(fused))
    assert [c.who for c in everyone] == [bench.TRAINED, bench.TRAINED_THEIRS] and calls == [28, 28]
    assert losses[bench.TRAINED] == pytest.approx(losses[bench.TRAINED_THEIRS], rel=2e-3) and len(losses[bench.TRAINED]) == 2
    rows = bench.training(stored, batches, 1, LIMITS)
    assert [row.who for row in rows] == [bench.TRAINED, bench.TRAINED_THEIRS] and rows[0].verdicts[0].met is not None
    assert bench.TRAINED in capsys.readouterr().out
