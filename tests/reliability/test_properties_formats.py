"""What holds of every file and state dict: written and read again it is the same bits, whatever was in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import Net, net, net_batch
from torch import nn

import peftk
from peftk.nn import NF4Linear
from peftk.optim.layouts import from_any
from peftk.optim.moments import AVERAGE, SLOW, SQUARE
from tests.reliability import strategies as s

flags = st.booleans()
MOMENTS = {"AdamW": (AVERAGE, SQUARE), "Lion": (AVERAGE,), "AdEMAMix": (AVERAGE, SQUARE, SLOW)}


def same(one: Any, other: Any) -> bool:
    """Bit for bit, of tensors in any containers."""
    if isinstance(one, torch.Tensor):
        is_alike = one.dtype == other.dtype and one.shape == other.shape
        return is_alike and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ---- weights in 4 bits ------------------------------------------------------------------------------------------------------


@s.examples(20)
@given(s.rows, s.sizes, s.kinds, s.seeds, s.dtypes, s.block_sizes, flags, s.quant_types)
def test_a_weights_entries(tmp_path, n, k, kind, seed, dtype, block_size, double_quant, quant_type):
    """bitsandbytes' form, by a file."""
    w4 = peftk.quantize_nf4(s.values((n, k), kind, seed, dtype), block_size, double_quant, quant_type=quant_type)
    save_file(w4.state_dict("layer."), tmp_path / "weight.safetensors")
    again = peftk.NF4Weight.from_state_dict(load_file(tmp_path / "weight.safetensors"), "layer.")
    facts = [(w.shape, w.dtype, w.block_size, w.quant_type) for w in (w4, again)]
    assert same([*w4.tensors()], [*again.tensors()]) and facts[0] == facts[1]


@s.examples(10)
@given(s.rows, s.sizes, s.seeds, s.dtypes, s.block_sizes, flags, flags)
def test_a_layers_state_dict(tmp_path, n, k, seed, dtype, block_size, double_quant, bias):
    """Into a layer of another block size and code, on the meta device too."""
    dense = nn.Linear(k, n, bias, dtype=dtype)
    dense.weight.data.copy_(s.values((n, k), "gaussian", seed, dtype))
    layer = NF4Linear.from_linear(dense, block_size, double_quant)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    for device in ("cpu", "meta"):
        other = NF4Linear(k, n, bias, block_size=128, double_quant=not double_quant, device=device, dtype=dtype)
        other.load_state_dict(torch.load(tmp_path / "layer.pt"), assign=device == "meta")
        assert same(dict(other.state_dict()), dict(layer.state_dict()))


# ---- adapters ---------------------------------------------------------------------------------------------------------------


def drawn(config: Any, seed: int, base: nn.Module | None = None) -> nn.Module:
    """A model whose adapter is random throughout."""
    model = peftk.attach(net() if base is None else base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peftk.trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model.eval()


def assert_read_again(model: nn.Module, base: nn.Module, folder: Path, inputs: dict[str, torch.Tensor]) -> None:
    """Outputs and files of the reader are the writer's, byte for byte."""
    peftk.save_adapter(model, folder / "first")
    again = peftk.load_adapter(base, folder / "first").eval()
    with torch.no_grad():
        outputs = [found if isinstance(found, torch.Tensor) else found.logits for found in (model(**inputs), again(**inputs))]
    assert same(*outputs)
    peftk.save_adapter(again, folder / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = (folder / place / name for place in ("first", "second"))
        assert one.read_bytes() == other.read_bytes() or json.loads(one.read_text()) == json.loads(other.read_text()), name


loras = st.fixed_dictionaries(
    {
        "r": st.integers(1, 9),
        "lora_alpha": st.integers(1, 33),
        "use_dora": flags,
        "use_rslora": flags,
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "target_modules": st.sampled_from([["q"], ["q", "v"], "all-linear"]),
        "modules_to_save": st.sampled_from([None, ["norm"]]),
        "rank_pattern": st.dictionaries(st.sampled_from(["q", "v"]), st.integers(1, 5)),
    }
)


def in_4_bits() -> Net:
    torch.manual_seed(5)
    return peftk.quantize_model(Net(), skip=("head",), progress=False).eval()


@s.examples(12)
@given(loras, s.seeds)
def test_lora(tmp_path_factory, fields, seed):
    config = lambda: peftk.LoraConfig(**{**fields, "exclude_modules": "head"})  # noqa: E731
    assert_read_again(drawn(config(), seed, in_4_bits()), in_4_bits(), tmp_path_factory.mktemp("lora"), net_batch())


@s.examples(4)
@given(st.integers(2, 6), st.lists(st.integers(0, 6), min_size=4, max_size=4), s.seeds)
def test_adalora(tmp_path_factory, init_r, masked, seed):
    """Directions that were pruned, as zeros in E."""
    config = peftk.AdaLoraConfig(init_r=init_r, target_r=1, total_step=20, target_modules=["q", "v"])
    model = drawn(config, seed, in_4_bits())
    values = [module.lora_E["default"] for module in model.modules() if hasattr(module, "lora_E")]
    with torch.no_grad():
        for e, count in zip(values, masked, strict=True):
            e[:count] = 0
    assert_read_again(model, in_4_bits(), tmp_path_factory.mktemp("adalora"), net_batch())


PROMPTS = {
    "prompt": lambda tokens: peftk.PromptTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM"),
    "prefix": lambda tokens: peftk.PrefixTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM"),
    "ptuning-v2": lambda tokens: peftk.PTuningV2Config(num_virtual_tokens=tokens, task_type="CAUSAL_LM"),
    "ptuning": lambda tokens: peftk.PTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM", encoder_hidden_size=8),
}


@pytest.mark.parametrize("kind", PROMPTS)
@s.examples(2)
@given(st.integers(1, 7), s.seeds)
def test_prompts(tmp_path_factory, kind, tokens, seed):
    from tiny_models import llama

    def base() -> nn.Module:
        torch.manual_seed(5)
        return llama().eval()

    inputs = {"input_ids": torch.randint(1, 61, (2, 5), generator=torch.Generator().manual_seed(seed))}
    model = drawn(PROMPTS[kind](tokens), seed, base())
    assert_read_again(model, base(), tmp_path_factory.mktemp(kind), inputs)


# ---- optimizers and pages ---------------------------------------------------------------------------------------------------


def stepped(kind: str, bits: int, shapes: list[tuple[int, ...]], seed: int, steps: int, **options: Any) -> Any:
    """An optimizer of random parameters after some steps."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = getattr(peftk.optim, kind + ("8bit" if bits == 8 else ""))(parameters, lr=0.01, **options)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


shapes = st.lists(st.sampled_from([(1,), (3, 5), (256,), (257,), (4097,), (64, 65)]), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", MOMENTS)
@s.examples(6)
@given(st.sampled_from([8, 32]), shapes, s.seeds, st.integers(1, 3))
def test_an_optimizers_state(tmp_path_factory, kind, bits, shapes, seed, steps):
    """By a file, and by bitsandbytes' layout and back; then the next steps are the same bits."""
    optimizer = stepped(kind, bits, shapes, seed, steps)
    path = tmp_path_factory.mktemp(kind) / "optimizer.pt"
    torch.save(optimizer.state_dict(), path)
    by_peer = from_any(peftk.optim.to_bitsandbytes(optimizer.state_dict()), MOMENTS[kind])
    tensors = [
        {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and "qmap" not in key}
        for found in (optimizer.state_dict(), by_peer)
        for state in found["state"].values()
    ]
    assert same(tensors[: len(shapes)], tensors[len(shapes) :])
    other = stepped(kind, bits, shapes, seed + 1, 1)
    other.load_state_dict(torch.load(path))
    with torch.no_grad():
        for p, q in zip(other.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
            p.copy_(q)
    for one in (optimizer, other):
        generator = torch.Generator().manual_seed(seed)
        for p in one.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
        one.step()
    assert same(*([p.detach() for p in one.param_groups[0]["params"]] for one in (optimizer, other)))


@s.examples(4)
@given(st.sampled_from([8, 32]), shapes, s.seeds)
def test_adamw_by_torchs_layout(bits, shapes, seed):
    """32 bits come back as they were; 8 bits mean the same numbers there."""
    optimizer = stepped("AdamW", bits, shapes, seed, 2)
    there = peftk.optim.to_torch(optimizer.state_dict())
    twin = torch.optim.AdamW([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    twin.load_state_dict(there)
    back = from_any(twin.state_dict(), MOMENTS["AdamW"])
    again = peftk.optim.to_torch(back)
    assert same(again["state"], there["state"])


@s.examples(4)
@given(st.lists(st.sampled_from([1, 1000, 4096, 70_000, 1 << 20]), min_size=1, max_size=4), s.seeds)
def test_a_page_file(tmp_path_factory, sizes, seed):
    """Whatever leaves memory comes back as it was."""
    from peftk.paging import Pager

    pager = Pager("cpu", 4 << 20, tmp_path_factory.mktemp("pages"), allow_tmpfs=True)
    generator = torch.Generator().manual_seed(seed)
    wanted = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]
    tensors = [pager.empty(size, torch.uint8) for size in sizes]
    for tensor, value in zip(tensors, wanted, strict=True):
        with pager.resident([tensor]) as (here,):
            here.copy_(value)
    filler = pager.empty(4 << 20, torch.uint8)
    with pager.resident([filler]) as (here,):
        here.fill_(7)
    for tensor, value in zip(tensors, wanted, strict=True):
        with pager.resident([tensor]) as (here,):
            assert same(here, value)
    pager.close()
