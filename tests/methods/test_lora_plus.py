"""LoRA+'s groups against HF peft's optimizer."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS, Net, hf_model, weight_grads

import peftk

CASES = {
    "llama": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    "bias": ("bert", {"target_modules": ["query"], "bias": "lora_only", "modules_to_save": ["classifier"]}),
    "norm": ("net", {"target_modules": ["q"], "modules_to_save": ["norm"]}),
    "dora": ("net", {"target_modules": ["q", "v"], "use_dora": True}),
}


def ours_by_key(model: torch.nn.Module) -> dict[int, str]:
    return {id(p): name.replace(".default", "") for name, p in model.named_parameters()}


def theirs_by_key(model: torch.nn.Module) -> dict[int, str]:
    short = lambda name: name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")  # noqa: E731
    return {id(p): short(name) for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_groups_are_hf_pefts(case):
    hf = pytest.importorskip("peft.optimizers")
    kind, fields = CASES[case]
    ours = MODELS[kind]()
    theirs = hf_model(ours, fields)
    peftk.attach(ours, peftk.LoraConfig(**fields))
    optimizer = hf.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_lr_embedding=1e-5, loraplus_weight_decay=0.1
    )
    groups = peftk.lora_plus_groups(ours, 1e-3, 8, lr_embedding=1e-5, weight_decay=0.1)

    def table(groups, keys):
        facts = lambda group: (pytest.approx(group["lr"]), group["weight_decay"])  # noqa: E731
        return {keys[id(p)].removesuffix(".weight"): facts(group) for group in groups for p in group["params"]}

    assert table(groups, ours_by_key(ours)) == table(optimizer.param_groups, theirs_by_key(theirs))
    torch.optim.AdamW(groups)


def test_b_moves_ratio_times_as_fast():
    model = peftk.attach(Net(), peftk.LoraConfig(target_modules=["q"], init_lora_weights=False))
    optimizer = torch.optim.SGD(peftk.lora_plus_groups(model, 0.01, 16), lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    weight_grads(model, "net")
    optimizer.step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(before[name] - p, p.grad * (0.16 if "lora_B" in name else 0.01))


@pytest.mark.parametrize(
    ("arguments", "message"), [({"ratio": 0.5}, "ratio: expected a number of at least 1, got 0.5"), ({"lr": -1}, "lr: expected")]
)
def test_bad_arguments_are_named(arguments, message):
    model = peftk.attach(Net(), peftk.LoraConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match=message):
        peftk.lora_plus_groups(model, **{"lr": 1e-3, **arguments})
    with pytest.raises(ValueError, match="expected one with adapters"):
        peftk.lora_plus_groups(Net(), 1e-3)
