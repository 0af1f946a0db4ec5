"""bench/models/bench_smollm2.py on a tiny model of the same architecture: everyone trains the same thing."""

import pytest
import torch

import peftk
from bench.limits import Limits
from bench.models import bench_smollm2 as bench

LIMITS = Limits(1e9, 1e9, 1e9, {torch.bfloat16: 1e9, torch.float32: 1e9})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch):
    transformers, *_ = (pytest.importorskip(package) for package in ("transformers", "peft", "bitsandbytes"))
    sizes = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks a row, which bitsandbytes' CPU kernel takes for granted
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, **heads, vocab_size=61, max_position_embeddings=32, initializer_range=0.1)

    def quantised():
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(config).requires_grad_(False)
        peftk.quantize_model(model, progress=False)
        return model.to(torch.bfloat16).eval()

    ids = [torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(9)]
    monkeypatch.setattr(bench, "quantised", quantised)
    monkeypatch.setattr(bench, "batches", lambda steps: ids[:steps])


def test_everyone_has_the_same_losses():
    everyone, losses = bench.candidates(3)
    assert [c.who for c in everyone] == [bench.OURS, bench.OWN_STEP, bench.ON_BITSANDBYTES, bench.ON_DENSE]
    for _ in range(3):
        for candidate in everyone:
            candidate.run()
    ours = torch.tensor(losses[bench.OURS])
    assert ours.shape == (3,) and len(ours.unique()) == 3  # other batches, other losses
    for who, seen in losses.items():
        assert torch.allclose(torch.tensor(seen), ours, rtol=6e-4), f"{who}: {seen}, ours {ours.tolist()}"


def test_everyone_trains_the_adapters_and_nothing_else():
    model = bench.ours()
    before = {name: p.clone() for name, p in model.named_parameters()}
    bench.plain_step(model)(bench.batches(1)[0])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name} and len(changed) == 2 * 2 * 7


def test_two_cases_with_their_goals(capsys: pytest.CaptureFixture):
    plain, own = bench.rows(4096, 2, LIMITS)
    printed = capsys.readouterr().out
    assert [line.split("  ")[0] for line in printed.strip().splitlines()] == [
        bench.OURS,
        bench.OWN_STEP,
        bench.ON_BITSANDBYTES,
        bench.ON_DENSE,
    ]
    for case, ours, goals in ((plain, bench.OURS, 2), (own, bench.OWN_STEP, 1)):
        assert [row.who for row in case] == [ours, bench.ON_BITSANDBYTES, bench.ON_DENSE]
        assert len(case[0].verdicts) == goals and all(verdict.met is not None for verdict in case[0].verdicts)
        assert all(row.note == f"{bench.TOKENS / row.p50:.0f} tokens/s" for row in case)
    assert plain[0].case.startswith(bench.HEADLINE)


def test_a_profile_shows_our_operators():
    text = bench.profile(rows=40)
    assert "peftk::nf4_lora_linear" in text and "peftk finetune, 3 steps" in text
