"""bench/models/bench_peft.py on a tiny model: all three train the same thing, one of them in the fused op."""

import pytest
import torch

import peftk
from bench.limits import Limits
from bench.models import bench_peft as bench
from bench.models import bench_smollm2
from peftk.nn import NF4Linear

LIMITS = Limits(1e9, 1e9, 1e9, {torch.bfloat16: 1e9, torch.float32: 1e9})


def test_equal_losses_and_only_one_is_fused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    transformers, *_ = (pytest.importorskip(package) for package in ("transformers", "peft", "bitsandbytes"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=61, initializer_range=0.1)

    def quantised():
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(config).requires_grad_(False)
        return peftk.quantize_model(model, progress=False).to(torch.bfloat16).eval()

    ids = [torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(9)]
    monkeypatch.setattr(bench_smollm2, "quantised", quantised)
    monkeypatch.setattr(bench_smollm2, "batches", lambda steps: ids[:steps])
    fused, original = [], NF4Linear.forward_low_rank
    monkeypatch.setattr(NF4Linear, "forward_low_rank", lambda *a, **k: fused.append(1) or original(*a, **k))
    everyone, losses = bench.candidates(2)
    calls = []
    for candidate in everyone:
        candidate.run()
        calls.append(len(fused))
    assert [c.who for c in everyone] == [bench.FUSED, bench.STOCK, bench.ON_BITSANDBYTES] and calls == [14, 14, 14]
    (first,) = losses[bench.FUSED]
    assert all(seen[0] == pytest.approx(first, rel=1e-3) for seen in losses.values())
    (rows,) = bench.rows(4096, 2, LIMITS)
    assert [row.who for row in rows] == [c.who for c in everyone] and "HF peft on peftk" in capsys.readouterr().out
