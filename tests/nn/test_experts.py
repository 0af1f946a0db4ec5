"""Fused experts, dense and in 4 bits, against transformers' own forward passes."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from numerics import Largest
from torch import nn

import peftk
from peftk.nn import Experts, NF4Linear, is_experts

KINDS = list(tiny.MIXTURES)


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return tiny.MIXTURES[kind]().eval()


def experts(kind: str) -> nn.Module:
    return model(kind).model.layers[0].mlp.experts


def tokens(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """10 tokens to two of four experts each; nobody goes to expert 2."""
    index = torch.tensor([[0, 1], [3, 0], [1, 3], [0, 3], [1, 0]]).repeat(2, 1)
    return torch.randn(10, 32, dtype=dtype), index, torch.rand(10, 2, dtype=dtype)


def decoded(layer: Experts) -> dict[str, torch.Tensor]:
    """The quantised weights as the dense module has them."""
    stacked = {name: torch.stack([m.dense_weight() for m in getattr(layer, name)]) for name in layer.projections()}
    return {name: w.mT if layer.is_transposed else w for name, w in stacked.items()}


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_equals_every_forward_of_transformers(kind, how):
    theirs, (x, index, weights) = experts(kind), tokens()
    theirs.config._experts_implementation = how
    ours = Experts.from_module(theirs)
    assert ours.down_proj is theirs.down_proj
    runs = []
    for layer in (theirs, ours):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        y = layer(leaves[0], index, leaves[1])
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        runs.append([y.detach(), *(t.grad for t in leaves)])
    for got, expected in zip(runs[1], runs[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_model_equals_its_decoded_twin(kind):
    """And each expert's bytes are those of quantize_nf4 on its matrix alone."""
    dense = model(kind)
    quantised = peftk.quantize_model(copy.deepcopy(dense), progress=False)
    twin = copy.deepcopy(dense)
    for path, layer in quantised.named_modules():
        if isinstance(layer, Experts):
            for name, w in decoded(layer).items():
                matrix = getattr(dense.get_submodule(path), name)[2]
                expected = peftk.quantize_nf4(matrix.T if layer.is_transposed else matrix)
                assert torch.equal(getattr(layer, name)[2].w4.packed.flatten(), expected.packed.flatten())
                getattr(twin.get_submodule(path), name).data.copy_(w)
        elif isinstance(layer, NF4Linear) and ".experts." not in path:
            twin.get_submodule(path).weight.data.copy_(layer.dense_weight())
    assert sum(isinstance(layer, Experts) for layer in quantised.modules()) == 2
    y, expected = (tiny.weight_grads(m, "llama") for m in (quantised, twin))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    named = dict(twin.named_parameters())
    for name, p in quantised.named_parameters():
        if p.grad is not None:  # norms, router, biases, embeddings: through the experts
            atol = 1e-4 * named[name].grad.abs().max().item()
            torch.testing.assert_close(p.grad, named[name].grad, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_matrix_and_never_all_of_them_are_decoded(dtype):
    """256 x 128 and 128 x 128, four experts: forward and backward make nothing that is as large as one expert's matrix."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    config._experts_implementation = "eager"
    holder = nn.ModuleDict({"experts": transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)})
    for p in holder.parameters():
        nn.init.normal_(p, std=0.1)
    peftk.quantize_model(holder.to(dtype), progress=False)
    x = torch.randn(10, 128, dtype=dtype, requires_grad=True)
    _, index, weights = tokens(dtype)
    with Largest() as seen:
        holder["experts"](x, index, weights).sum().backward()
    assert x.grad.any() and 10 * 128 <= seen.numel < 128 * 128


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip_and_dense_files(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    dense = model(kind)
    quantised = peftk.quantize_model(copy.deepcopy(dense), progress=False)
    y = tiny.run(quantised, "llama")
    save_file({k: v.contiguous() for k, v in quantised.state_dict().items()}, tmp_path / "model.safetensors")
    other = peftk.quantize_model(tiny.MIXTURES[kind]().eval(), progress=False)
    assert not torch.allclose(tiny.run(other, "llama"), y)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(tiny.run(other, "llama"), y)
    layer = other.model.layers[0].mlp.experts
    assert "model.layers.0.mlp.experts.gate_up_proj.3.weight.absmax" in other.state_dict()
    with torch.no_grad():
        layer.gate_up_proj[0].set_dense_weight(torch.zeros(96, 32))
    other.load_state_dict(dense.state_dict())  # a dense weight is quantised as it comes
    assert torch.equal(tiny.run(other, "llama"), y)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    quantised = peftk.quantize_model(model("gpt_oss"), progress=False)
    twin = copied(quantised)
    assert torch.equal(tiny.run(twin, "llama"), tiny.run(quantised, "llama"))
    twin.bfloat16()
    layer = twin.model.layers[0].mlp.experts
    assert layer.gate_up_proj_bias.dtype == torch.bfloat16 and layer.gate_up_proj[0].weight.dtype == torch.uint8
    assert tiny.run(twin, "llama").dtype == torch.bfloat16


def test_tokens_without_an_expert():
    layer, (x, index, weights) = Experts.from_module(experts("mixtral")), tokens()
    y = layer(x, index, weights)
    with_none = layer(torch.cat([x, x[:1]]), torch.cat([index, torch.tensor([[4, 4]])]), torch.cat([weights, weights[:1]]))
    torch.testing.assert_close(with_none[:10], y)
    assert not with_none[10].any()
    assert layer(x[:0], index[:0], weights[:0]).shape == (0, 32)


def test_skip_leaves_experts_or_one_projection_dense():
    kept = peftk.quantize_model(model("mixtral"), skip=("experts",), progress=False)
    assert is_experts(kept.model.layers[0].mlp.experts)
    half = peftk.quantize_model(model("mixtral"), skip=("experts.down_proj",), progress=False)
    layer = half.model.layers[1].mlp.experts
    assert isinstance(layer.down_proj, nn.Parameter) and isinstance(layer.gate_up_proj[0], NF4Linear)
    assert tiny.run(half, "llama").isfinite().all()


def test_what_is_refused():
    holder = nn.ModuleDict({"experts": experts("mixtral")})
    with torch.no_grad():
        holder["experts"].down_proj[3, 1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"experts\.down_proj\[3\]: .*finite"):
        peftk.quantize_model(holder, progress=False)
    with pytest.raises(TypeError, match="model: expected a module that holds linear layers, got fused experts"):
        peftk.quantize_model(experts("mixtral"), progress=False)
    with pytest.raises(TypeError, match="module: expected fused experts by transformers' protocol, got Linear"):
        Experts.from_module(nn.Linear(2, 2))


def test_other_experts_are_refused_by_name():
    transformers = pytest.importorskip("transformers")
    config = transformers.Llama4TextConfig(hidden_size=32, intermediate_size=16, num_local_experts=2)
    own = transformers.models.llama4.modeling_llama4.Llama4TextExperts(config)
    nn.init.normal_(own.down_proj)
    holder = nn.ModuleDict({"first": nn.Linear(4, 4), "ffn": nn.ModuleDict({"experts": own})})
    before = tiny.state_of(holder)
    message = r"ffn\.experts, a Llama4TextExperts with gate_up_proj, down_proj; skip=\('ffn\.experts',\) leaves them dense"
    with pytest.raises(ValueError, match=message):
        peftk.quantize_model(holder, progress=False)
    tiny.assert_same_state(before, tiny.state_of(holder))
    peftk.quantize_model(holder, skip=("ffn.experts",), progress=False)
    assert isinstance(holder["first"], NF4Linear) and holder["ffn"]["experts"] is own
