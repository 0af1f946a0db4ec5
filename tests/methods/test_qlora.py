"""QLoRA as a recipe, with starts that are taken out of the weights before these are quantised."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import assert_same_state, llama, run, state_of, t5, weight_grads

import peftk
from peftk.methods.attach import wrappers
from peftk.nn import NF4Linear

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def error(w: torch.Tensor, other: torch.Tensor) -> float:
    return ((w - other).norm() / w.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": True},
    ],
    ids=lambda fields: str(fields["init_lora_weights"]),
)
def test_starts_from_the_dense_weights(fields, dtype):
    model = llama().to(dtype).eval()
    dense = copy.deepcopy(model)
    config = peftk.qlora_config(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"], **fields)
    peftk.qlora(model, config, block_size=32, double_quant=False, progress=False)
    layers = dict(wrappers(model))
    assert len(layers) == 4
    for path, module in dense.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            ours = layers[path].base_layer if path in layers else model.get_submodule(path)
            assert isinstance(ours, NF4Linear) and ours.block_size == 32 and not ours.double_quant and ours.weight_dtype == dtype
            w, plain = module.weight.float(), peftk.quantize_nf4(module.weight.float(), 32, False).dequantize()
            if path in layers and fields["init_lora_weights"] is not True:
                assert error(w, layers[path].read_weight()) < 0.9 * error(w, plain)
            else:
                assert torch.equal(ours.dense_weight(), plain)
    assert type(model.lm_head) is torch.nn.Linear
    weight_grads(model.train(), "llama")
    assert all(p.grad.any() for p in peftk.trainable_parameters(model) if p.shape[0] != 8)  # B's
    if fields["init_lora_weights"] is not True:
        assert (run(model.eval(), "llama") - run(dense, "llama")).norm() < (
            run(plain_twin(dense), "llama") - run(dense, "llama")
        ).norm()


def plain_twin(dense: torch.nn.Module) -> torch.nn.Module:
    """Quantised alike, without an adapter."""
    return peftk.quantize_model(copy.deepcopy(dense), block_size=32, double_quant=False, progress=False)


def test_loftq_only_where_a_layer_may_be_quantised():
    model = t5()
    before = state_of(model)
    config = peftk.qlora_config(r=4, target_modules=["q", "wo"], init_lora_weights="loftq")
    with pytest.raises(ValueError, match="target_modules: expected layers that are quantised .*, got encoder.*wo.* kept dense"):
        peftk.qlora(model, config, progress=False)
    assert_same_state(before, state_of(model))
    peftk.qlora(model, peftk.qlora_config(r=4, target_modules=["q", "wo"], init_lora_weights="pissa"), progress=False)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.is_floating_point() and wo.taken is not None
    assert run(model, "t5").isfinite().all()
