"""NF4Linear: nn.Linear's behaviour on 4-bit bytes that nothing but a new weight may change."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from numerics import row_scaled
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftk
from peftk.nn import NF4Linear

SHAPES = [(10, 64), (7, 80), (5, 33), (3, 7), (1, 1), (6, 128)]  # (n, k): whole blocks, k % 64 != 0, odd k, odd n * k
shapes = pytest.mark.parametrize(("n", "k"), SHAPES, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(n: int = 10, k: int = 80, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias, dtype=dtype)
    layer.weight.data.copy_(row_scaled(n, k))
    return layer


def stored(layer: NF4Linear) -> dict[str, list]:
    """Every stored byte, the bias apart, with dtypes."""
    tensors = {name: getattr(layer, name) for name in ("weight", "absmax", "absmax_scale", "absmax_offset")}
    return {
        k: (t.dtype, tuple(t.shape), t.detach().reshape(-1).view(torch.uint8).tolist())
        for k, t in tensors.items()
        if t is not None
    }


def dense(layer: NF4Linear) -> nn.Linear:
    """The same layer with its decoded weight."""
    other = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    other.weight.data.copy_(layer.dense_weight())
    if layer.bias is not None:
        other.bias.data.copy_(layer.bias)
    return other


# ---- what it is ----------------------------------------------------------------------------------------------


@shapes
def test_shape_of_the_parameter(n, k):
    layer = NF4Linear(k, n)
    assert isinstance(layer, nn.Linear) and isinstance(layer.weight, nn.Parameter)
    assert layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
    assert tuple(layer.weight.shape) == ((n, k // 2) if k % 2 == 0 else (-(-n * k // 2), 1))
    assert layer.bias.shape == (n,) and layer.bias.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.state_dict()["weight"].shape == (-(-n * k // 2), 1)


@shapes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_linear(n, k, dtype):
    origin = linear(n, k, dtype=dtype)
    layer = NF4Linear.from_linear(origin.eval(), block_size=32, double_quant=False)
    expected = peftk.quantize_nf4(origin.weight, 32, False)
    assert layer.bias is origin.bias and not layer.training and layer.weight_dtype == dtype
    assert torch.equal(layer.w4.packed.reshape(-1), expected.packed) and torch.equal(layer.absmax, expected.absmax)
    assert torch.equal(layer.dense_weight(), expected.dequantize(torch.float32)) and layer.dense_weight().dtype == torch.float32
    assert layer.absmax_scale is None and (layer.block_size, layer.double_quant) == (32, False)


def test_from_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(10, 80)
    conv1d.weight.data.copy_(row_scaled(10, 80).T)
    layer = NF4Linear.from_linear(conv1d)
    assert (layer.in_features, layer.out_features) == (80, 10) and layer.bias is conv1d.bias
    assert torch.equal(layer.dense_weight(), peftk.quantize_nf4(conv1d.weight.T).dequantize(torch.float32))


def test_from_linear_refuses():
    origin = linear()
    origin.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layers.7.weight: expected finite values, got nan at index \(3, 5\)"):
        NF4Linear.from_linear(origin, name="layers.7.weight")
    for module in (nn.Embedding(4, 64), NF4Linear(64, 4), nn.Conv1d(3, 4, 1)):
        with pytest.raises(TypeError, match=f"linear: expected nn.Linear or Conv1D .* got {type(module).__name__}"):
            NF4Linear.from_linear(module)


def test_repr():
    assert repr(NF4Linear(64, 8)) == "NF4Linear(in_features=64, out_features=8, bias=True, nf4, block_size=64, double_quant)"
    assert repr(NF4Linear(64, 8, False, 128, False)).endswith("bias=False, nf4, block_size=128)")


# ---- forward and gradients -----------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward(n, k, dtype, bias):
    layer = NF4Linear.from_linear(linear(n, k, bias))
    x = torch.randn(2, 3, k, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, n)
    expected = dense(layer).double()(x.double())
    assert (y.double() - expected).norm() <= {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[
        dtype
    ] * expected.norm()
    assert layer(x[0, 0]).shape == (n,) and layer(x[:0]).shape == (0, 3, n)


@shapes
def test_gradients_are_the_dense_ones(n, k):
    layer = NF4Linear.from_linear(linear(n, k))
    other = dense(layer)
    x, dy = torch.randn(5, k), torch.randn(5, n)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(x1).backward(dy), other(x2).backward(dy)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, other.bias.grad)
    assert layer.weight.grad is None


@pytest.mark.parametrize("compute_dtype", DTYPES, ids=str)
def test_compute_dtype(compute_dtype):
    origin = linear()
    layer = NF4Linear.from_linear(origin, compute_dtype=compute_dtype)
    plain = NF4Linear.from_linear(origin)
    x = torch.randn(5, 80, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.float32 and torch.equal(y, plain(x.to(compute_dtype)).float())
    A, B = torch.randn(4, 80), torch.randn(10, 4)
    y = layer.forward_low_rank(x, A, B, 0.5, z=x * 2)
    assert torch.equal(y, plain.forward_low_rank(x.to(compute_dtype), A, B, 0.5, z=(x * 2).to(compute_dtype)).float())
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    layer = NF4Linear.from_linear(linear())
    x = torch.randn(5, 80, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        z = layer.forward_low_rank(x, torch.randn(4, 80), torch.randn(10, 4), 0.5)
        assert dense(layer)(x).dtype == y.dtype == z.dtype == dtype
    assert torch.equal(y, layer(x.to(dtype)))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.bias.grad.dtype == torch.float32


def test_forward_low_rank_without_b_is_forward():
    """At the start of LoRA the output is that of the layer alone, bit for bit."""
    layer = NF4Linear.from_linear(linear())
    for dtype in DTYPES:
        x = torch.randn(5, 80, dtype=dtype)
        assert torch.equal(layer.forward_low_rank(x, torch.randn(4, 80), torch.zeros(10, 4), 2.0), layer(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    layers = nn.Sequential(NF4Linear.from_linear(linear(80, 80)), nn.GELU(), NF4Linear.from_linear(linear(10, 80)))
    x1 = torch.randn(5, 80, requires_grad=True)
    layers(x1).square().sum().backward()
    expected = [x1.grad, *(p.grad for p in layers.parameters() if p.grad is not None)]
    layers.zero_grad()
    x2 = x1.detach().clone().requires_grad_()
    checkpoint(layers, x2, use_reentrant=reentrant).square().sum().backward()
    got = [x2.grad, *(p.grad for p in layers.parameters() if p.grad is not None)]
    assert len(got) == len(expected) == 3 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_compiles_in_one_graph(compute_dtype):
    layer = NF4Linear.from_linear(linear(), compute_dtype=compute_dtype)
    torch.compiler.reset()
    A, B = torch.randn(4, 80, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    step = lambda x: layer(x).sum() + layer.forward_low_rank(x, A, B, 0.5).square().sum()  # noqa: E731
    x1 = torch.randn(5, 80, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    step(x1).backward()
    eager = [x1.grad, A.grad, B.grad, layer.bias.grad]
    A.grad = B.grad = layer.bias.grad = None
    torch.compile(step, fullgraph=True, backend="aot_eager")(x2).backward()
    for got, expected in zip([x2.grad, A.grad, B.grad, layer.bias.grad], eager, strict=True):
        torch.testing.assert_close(got, expected)


# ---- the stored bytes stay -----------------------------------------------------------------------------------

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "to(bf16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, fp16)": lambda m: m.to("cpu", torch.float16),
    "to(fp64) and back": lambda m: m.to(torch.float64).to(torch.float32),
    "fp16 and back": lambda m: m.half().float(),
    "type": lambda m: m.type(torch.float16),
    "eval": lambda m: m.eval(),
    "train": lambda m: m.train(),
    "share_memory": lambda m: m.share_memory(),
    "forward": lambda m: (m.eval()(torch.randn(3, m[0].in_features)), m)[1],
    "training step": lambda m: (m(torch.randn(3, m[0].in_features)).sum().backward(), m)[1],
}


@pytest.mark.parametrize("change", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("k", [80, 33])
def test_bytes_stay(change, double_quant, k):
    model = nn.Sequential(NF4Linear.from_linear(linear(10, k), double_quant=double_quant))
    before, entries = stored(model[0]), {key: t.clone() for key, t in model.state_dict().items()}
    model = change(model)
    assert stored(model[0]) == before and model[0].weight_dtype == torch.float32
    after = model.state_dict()
    assert list(after) == list(entries)
    assert all(
        torch.equal(after[key], t) and after[key].dtype == t.dtype for key, t in entries.items() if not key.endswith("bias")
    )
    x = torch.randn(3, k)
    restored = NF4Linear(k, 10, double_quant=double_quant)
    restored.load_state_dict({key.removeprefix("0."): t for key, t in after.items()})
    assert torch.equal(restored(x), model.float()(x))


def test_the_bias_is_cast():
    assert (
        NF4Linear(64, 8).half().bias.dtype == torch.float16 and NF4Linear(64, 8).type(torch.float64).bias.dtype == torch.float64
    )


@shapes
@pytest.mark.parametrize("double_quant", [True, False])
def test_copies(n, k, double_quant):
    layer, file = NF4Linear.from_linear(linear(n, k), double_quant=double_quant), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x, before = torch.randn(3, k), stored(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert stored(other) == before and torch.equal(other(x), layer(x))
        other.set_dense_weight(torch.ones(n, k))
        assert stored(layer) == before


def test_meta_and_to_empty():
    meta = NF4Linear(80, 10, device="meta")
    layer = NF4Linear.from_linear(linear())
    assert all(t.is_meta for t in (meta.weight, meta.absmax, meta.bias)) and meta(torch.randn(3, 80, device="meta")).shape == (
        3,
        10,
    )
    empty = meta.to_empty(device="cpu")
    assert {k: v[:2] for k, v in stored(empty).items()} == {k: v[:2] for k, v in stored(layer).items()}
    empty.load_state_dict(layer.state_dict())
    assert stored(empty) == stored(layer) and torch.equal(empty.bias, layer.bias)


@pytest.mark.parametrize("k", [80, 33])
def test_reset_parameters(k):
    """As after to_empty: a fresh weight in nn.Linear's range, in the same Parameter."""
    layer = NF4Linear(k, 10, dtype=torch.bfloat16)
    before, weight = stored(layer), layer.weight
    layer.reset_parameters()
    w = layer.dense_weight()
    assert layer.weight is weight and stored(layer) != before and layer.weight_dtype == torch.bfloat16
    assert 0.5 * k**-0.5 < w.abs().max() <= 1.1 * k**-0.5 and layer.bias.abs().max() <= k**-0.5


# ---- dense weights in and out --------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("double_quant", [True, False])
def test_set_dense_weight(n, k, double_quant):
    layer = NF4Linear.from_linear(linear(n, k, dtype=torch.bfloat16), 32, double_quant)
    parameter, w = layer.weight, row_scaled(n, k)
    layer.set_dense_weight(w)
    assert layer.weight is parameter and layer.weight_dtype == torch.bfloat16
    assert torch.equal(layer.dense_weight(), peftk.quantize_nf4(w, 32, double_quant).dequantize(torch.float32))


def test_set_dense_weight_refuses_and_leaves_the_layer():
    layer = NF4Linear.from_linear(linear())
    before = stored(layer)
    with pytest.raises(ValueError, match=r"w: expected \(10, 80\), got \(80, 10\)"):
        layer.set_dense_weight(torch.zeros(80, 10))
    bad = torch.zeros(10, 80)
    bad[9, 79] = float("inf")
    with pytest.raises(ValueError, match=r"w: expected finite values, got inf at index \(9, 79\)"):
        layer.set_dense_weight(bad)
    assert stored(layer) == before


@shapes
@pytest.mark.parametrize("double_quant", [True, False])
def test_snapshot_and_restore(n, k, double_quant):
    layer = NF4Linear.from_linear(linear(n, k), double_quant=double_quant)
    before, snapshot, parameter = stored(layer), layer.weight_snapshot(), layer.weight
    for _ in range(2):  # a snapshot serves more than once
        layer.set_dense_weight(row_scaled(n, k))
        assert stored(layer) != before
        layer.restore_weight(snapshot)
        assert stored(layer) == before and layer.weight is parameter
    with pytest.raises(ValueError, match=rf"snapshot: expected \({n}, {k}\), got \(2, {k + n}\)"):
        layer.restore_weight(NF4Linear(k + n, 2).weight_snapshot())


# ---- loading -------------------------------------------------------------------------------------------------


def bitsandbytes_entries(layer: nn.Linear, quant_type: str, nested: bool, storage=torch.uint8) -> dict[str, torch.Tensor]:
    bnb = pytest.importorskip("bitsandbytes")
    n, k = layer.weight.shape
    theirs = bnb.nn.Linear4bit(k, n, layer.bias is not None, torch.float32, nested, quant_type, storage)
    theirs.load_state_dict(layer.state_dict())
    return dict(theirs.to("cpu").state_dict(prefix="1."))


def model_of(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), layer)


ways = pytest.mark.parametrize(("device", "assign"), [("cpu", False), ("cpu", True), ("meta", False), ("meta", True)])


@ways
@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_loads_bitsandbytes(device, assign, quant_type, nested, storage):
    entries = bitsandbytes_entries(linear(32, 128), quant_type, nested, storage)
    model = model_of(NF4Linear(128, 32, device=device))
    parameter = model[1].weight
    assert str(model.load_state_dict(entries, assign=assign)) == "<All keys matched successfully>"
    layer, w4 = model[1], peftk.NF4Weight.from_state_dict(entries, "1.")
    assert (layer.quant_type, layer.double_quant, layer.block_size, layer.weight_dtype) == (quant_type, nested, 64, torch.float32)
    assert torch.equal(layer.dense_weight(), w4.dequantize(torch.float32)) and torch.equal(layer.bias, entries["1.bias"])
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert (layer.weight is parameter) == (device == "cpu" and not assign)
    shares = [
        layer.weight.data_ptr() == entries["1.weight"].data_ptr(),
        layer.absmax.data_ptr() == entries["1.weight.absmax"].data_ptr(),
    ]
    assert shares == [assign, assign] and (layer.bias.data_ptr() == entries["1.bias"].data_ptr()) == assign
    saved = model.state_dict()
    assert list(saved) == list(entries)
    for key, tensor in entries.items():
        assert torch.equal(saved[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), key


@ways
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("k", "double_quant"), [(80, True), (33, False)])
def test_loads_a_float_weight(device, assign, dtype, k, double_quant):
    origin = linear(10, k, dtype=dtype)
    model = model_of(NF4Linear(k, 10, block_size=32, double_quant=double_quant, device=device))
    model.load_state_dict(model_of(origin).state_dict(), assign=assign)
    expected = stored(NF4Linear.from_linear(origin, 32, double_quant))
    assert stored(model[1]) == expected and model[1].weight_dtype == dtype
    assert torch.equal(model[1].bias, origin.bias if assign or device == "meta" else origin.bias.float())
    assert f'"dtype": "{str(dtype)[6:]}"' in bytes(model.state_dict()["1.weight.quant_state.bitsandbytes__nf4"].tolist()).decode()


def test_a_float_weight_keeps_the_code():
    layer = NF4Linear(128, 32)
    layer.load_state_dict({k[2:]: t for k, t in bitsandbytes_entries(linear(32, 128), "fp4", True).items()})
    layer.load_state_dict(origin := linear(32, 128).state_dict())
    assert torch.equal(layer.dense_weight(), peftk.quantize_nf4(origin["weight"], quant_type="fp4").dequantize(torch.float32))


def without(entries: dict, *keys: str) -> dict:
    return {key: t for key, t in entries.items() if key not in keys}


LOADS = {
    "no weight": (lambda e, f: without(f, "1.weight"), r'Missing key\(s\) in state_dict: "1.weight"'),
    "no bias": (lambda e, f: without(e, "1.bias"), r'Missing key\(s\) in state_dict: "1.bias"'),
    "nothing": (lambda e, f: {}, r'Missing key\(s\) in state_dict: "1.weight", "1.bias"'),
    "codes without constants": (lambda e, f: {k: e[k] for k in ("1.weight", "1.bias")}, "1.weight: expected it beside exactly"),
    "constants without codes": (lambda e, f: without(e, "1.weight"), r'Missing .*"1.weight"(.|\n)*Unexpected .*"1.weight.abs'),
    "no absmax": (lambda e, f: without(e, "1.weight.absmax"), r"1.weight: missing parts \['absmax'\]"),
    "a part more": (lambda e, f: {**e, "1.weight.more": torch.zeros(1)}, r"1.weight: .*unexpected parts \['more'\]"),
    "a key more": (lambda e, f: {**e, "1.scale": torch.zeros(1)}, r'Unexpected key\(s\) in state_dict: "1.scale"'),
    "a child more": (lambda e, f: {**f, "1.weights.absmax": torch.zeros(1)}, r'Unexpected key\(s\) .* "1.weights.absmax"'),
    "another table": (lambda e, f: {**e, "1.weight.quant_map": torch.linspace(-1, 1, 16)}, "1.weight.quant_map: expected the 16"),
    "float of another shape": (lambda e, f: {**f, "1.weight": torch.zeros(10, 81)}, r"for 1.weight: expected shape \(10, 80\)"),
    "4-bit of another shape": (
        lambda e, f: {**NF4Linear(160, 5).state_dict(prefix="1."), "1.bias": f["1.bias"]},
        r"size mismatch for 1.weight: expected shape \(10, 80\), got \(5, 160\)",
    ),
    "bias of another shape": (lambda e, f: {**f, "1.bias": torch.zeros(9)}, r"for 1.bias: expected shape \(10,\), got"),
    "NaN": (lambda e, f: {**f, "1.weight": torch.full((10, 80), torch.nan)}, "1.weight: expected finite values, got nan"),
    "integers": (lambda e, f: {**f, "1.weight": torch.zeros(10, 80, dtype=torch.int64)}, "1.weight: expected it beside exactly"),
    "no tensor": (lambda e, f: {**f, "1.weight": None}, "1.weight: expected it beside exactly"),
    "two at once": (lambda e, f: {"1.weight": e["1.weight"]}, r'Missing .*"1.bias"(.|\n)*1.weight: expected it beside exactly'),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), LOADS.values(), ids=LOADS.keys())
def test_refuses_to_load(make, message):
    entries, floats = (model_of(layer).state_dict() for layer in (NF4Linear.from_linear(linear()), linear()))
    model = model_of(NF4Linear.from_linear(linear()))
    before, identity = stored(model[1]), model[1].weight
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(make(entries, floats))
    assert re.search(message, str(caught.value)), caught.value
    if "1.weight" in message and not message.startswith("Unexpected"):
        assert stored(model[1]) == before and model[1].weight is identity


def test_not_strict():
    model = model_of(NF4Linear.from_linear(linear()))
    before = stored(model[1])
    result = model.load_state_dict({"1.bias": torch.ones(10), "1.more": torch.zeros(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["1.weight"], ["1.more"])
    assert stored(model[1]) == before and torch.equal(model[1].bias, torch.ones(10))


def test_a_layer_without_bias():
    layer = NF4Linear.from_linear(linear(bias=False))
    assert layer.bias is None and "bias" not in layer.state_dict()
    layer.load_state_dict(NF4Linear.from_linear(linear(bias=False)).state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bias"'):
        layer.load_state_dict(linear().state_dict())


def test_load_hooks_run():
    layer, seen = NF4Linear(64, 8), []
    layer.register_load_state_dict_pre_hook(lambda module, entries, prefix, *_: seen.append((module, prefix)))
    model_of(layer).load_state_dict(model_of(NF4Linear(64, 8)).state_dict())
    assert seen == [(layer, "1.")]


def test_two_layers_do_not_share_what_they_loaded():
    entries = NF4Linear.from_linear(linear()).state_dict()
    one, two = NF4Linear(80, 10, device="meta"), NF4Linear(80, 10, device="meta")
    one.load_state_dict(entries), two.load_state_dict(entries)
    before = stored(two)
    one.set_dense_weight(torch.ones(10, 80))
    assert stored(two) == before and torch.equal(entries["weight"].flatten(), two.weight.flatten())
