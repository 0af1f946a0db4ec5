"""NF4Weight: bitsandbytes' checkpoint form byte for byte, every field of a file checked, and a tensor's usual life."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from numerics import row_scaled
from safetensors.torch import load_file, save_file

import peftk
from peftk import NF4Weight
from peftk.format.code4 import values4
from peftk.format.dynamic8 import values8

KINDS = [(q, nested) for q in ("nf4", "fp4") for nested in (True, False)]
kinds = pytest.mark.parametrize(("quant_type", "nested"), KINDS, ids=[f"{q}-{'nested' if n else 'plain'}" for q, n in KINDS])
SHAPES = [(32, 128), (5, 80), (3, 33), (7,), (1001,), (3, 5, 7), (1, 1), (), (0, 8), (0,)]


def quantised(*shape: int, quant_type: str = "nf4", nested: bool = True, dtype=torch.bfloat16, block_size: int = 64) -> NF4Weight:
    w = row_scaled(*shape, dtype=dtype) if shape else torch.tensor(3.25, dtype=dtype)
    return peftk.quantize_nf4(w, block_size, nested, quant_type=quant_type)


def assert_same_entries(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Keys in the same order, dtypes, shapes and bytes."""
    assert list(got) == list(expected)
    for key, tensor in expected.items():
        assert got[key].dtype == tensor.dtype and got[key].shape == tensor.shape, key
        as_bytes = [t.detach().cpu().contiguous().view(torch.uint8).tolist() for t in (got[key], tensor)]
        assert as_bytes[0] == as_bytes[1], key


def assert_same_weight(a: NF4Weight, b: NF4Weight) -> None:
    facts = [(w.shape, w.dtype, w.block_size, w.quant_type, w.device) for w in (a, b)]
    assert facts[0] == facts[1]
    assert_same_entries(a.state_dict("p."), b.state_dict("p."))


def bnb_linear(quant_type: str, nested: bool, dtype=torch.bfloat16, block=64, storage=torch.uint8, n=32, k=128, bias=True):
    """bitsandbytes' own layer, quantised by bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(k, n, bias=bias, compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
    weight = bnb.nn.Params4bit(
        row_scaled(n, k, dtype=dtype), quant_type=quant_type, compress_statistics=nested, blocksize=block, quant_storage=storage,
        module=layer,
    )  # fmt: skip
    layer.weight = weight
    return layer.to("cpu")


# ---- bitsandbytes' files -------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(("dtype", "block"), [(torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 4096)], ids=str)
def test_bitsandbytes_file_goes_through_unchanged(tmp_path, quant_type, nested, dtype, block):
    """Saved by bitsandbytes to disk, read by us, written by us: identical, JSON included."""
    theirs = bnb_linear(quant_type, nested, dtype, block, bias=False).state_dict(prefix="layers.0.")
    save_file(theirs, tmp_path / "w.safetensors")
    w4 = NF4Weight.from_state_dict(load_file(tmp_path / "w.safetensors"), "layers.0.")
    assert (w4.dtype, w4.block_size, w4.shape, w4.quant_type) == (dtype, block, (32, 128), quant_type)
    assert_same_entries(w4.state_dict("layers.0."), dict(theirs))


@kinds
@pytest.mark.parametrize("shape", [(32, 128), (5, 80), (3, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bitsandbytes_writes_our_bytes_as_we_do(quant_type, nested, shape, dtype):
    """Our bytes in a bitsandbytes layer: its state_dict is ours."""
    bnb = pytest.importorskip("bitsandbytes")
    ours = quantised(*shape, quant_type=quant_type, nested=nested, dtype=dtype).state_dict("p.")
    stats = {key: tensor.clone() for key, tensor in ours.items() if key != "p.weight"}
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False)
    layer.weight = bnb.nn.Params4bit.from_prequantized(ours["p.weight"].clone(), stats, device="cpu", module=layer)
    assert_same_entries(ours, dict(layer.state_dict(prefix="p.")))


@kinds
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quant_storage(tmp_path, quant_type, nested, storage):
    """The same bytes under another dtype; they are uint8 here."""
    layer = bnb_linear(quant_type, nested, storage=storage, bias=False)
    save_file(layer.state_dict(prefix="p."), tmp_path / "w.safetensors")
    w4 = NF4Weight.from_state_dict(load_file(tmp_path / "w.safetensors"), "p.")
    raw = layer.weight.data.contiguous().view(torch.uint8).flatten()
    assert w4.packed.dtype == torch.uint8 and w4.packed.tolist() == raw.tolist()
    import bitsandbytes.functional as functional

    theirs = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(w4.dequantize(), theirs, rtol=0, atol=0)


def test_json_as_documented():
    w4 = quantised(32, 128)
    entries = w4.state_dict()
    offset = w4.absmax_offset.item()
    assert bytes(entries["weight.quant_state.bitsandbytes__nf4"].tolist()).decode() == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 128], "nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {offset!r}}}'
    )
    plain = quantised(5, 80, nested=False, dtype=torch.float32, block_size=32, quant_type="fp4").state_dict("x.")
    assert list(plain) == ["x.weight", "x.weight.absmax", "x.weight.quant_map", "x.weight.quant_state.bitsandbytes__fp4"]
    assert bytes(plain["x.weight.quant_state.bitsandbytes__fp4"].tolist()).decode() == (
        '{"quant_type": "fp4", "blocksize": 32, "dtype": "float32", "shape": [5, 80]}'
    )
    assert plain["x.weight"].shape == (200, 1) and plain["x.weight.absmax"].shape == (13,)


# ---- round trips ---------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape, quant_type, nested):
    w4 = quantised(*shape, quant_type=quant_type, nested=nested, block_size=32)
    count = torch.Size(shape).numel()
    back = NF4Weight.from_state_dict(w4.state_dict("a.b."), "a.b.")
    assert_same_weight(back, w4)
    assert w4.packed.numel() == (count + 1) // 2 and w4.nbytes == sum(t.nbytes for t in w4.tensors() if t is not None)
    assert back.dequantize().shape == shape and torch.equal(back.dequantize(), w4.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_is_recorded(dtype):
    w4 = quantised(4, 64, dtype=dtype)
    assert NF4Weight.from_state_dict(w4.state_dict()).dtype == dtype == w4.dequantize().dtype


def test_two_weights_fit_in_one_file(tmp_path):
    """safetensors refuses tensors that share memory: each weight's tables are its own."""
    entries = {**quantised(4, 64).state_dict("a."), **quantised(8, 32).state_dict("b.")}
    save_file(entries, tmp_path / "w.safetensors")
    assert_same_entries(dict(sorted(load_file(tmp_path / "w.safetensors").items())), dict(sorted(entries.items())))


def test_entries_are_not_the_cached_tables():
    entries = quantised(4, 64).state_dict()
    entries["weight.quant_map"].zero_(), entries["weight.nested_quant_map"].zero_()
    assert values4("nf4", torch.device("cpu"))[0] == -1 and values8()[-1] == 1


def test_no_copy_of_the_bytes():
    entries = quantised(4, 64).state_dict()
    w4 = NF4Weight.from_state_dict(entries)
    for mine, key in ((w4.packed, "weight"), (w4.absmax, "weight.absmax"), (w4.absmax_scale, "weight.nested_absmax")):
        assert mine.data_ptr() == entries[key].data_ptr()


def test_nonfinite_constants_pass_through():
    """Stored bytes of a file pass through unchanged, whatever wrote them."""
    w = row_scaled(4, 64)
    w[2, 5] = float("nan")
    w4 = peftk.quantize_nf4(w, double_quant=False, nonfinite="keep")
    back = NF4Weight.from_state_dict(w4.state_dict())
    assert back.absmax.isnan().tolist() == [False, False, True, False]
    assert_same_weight(back, w4)


def test_strided_constants_are_read_right():
    """Kernels take bare addresses: a file's strided tensors are made contiguous."""
    w4 = quantised(40, 512)
    entries = {key: torch.stack([t, t], -1)[..., 0] for key, t in w4.state_dict().items()}
    assert not entries["weight.absmax"].is_contiguous()
    back = NF4Weight.from_state_dict(entries)
    assert all(t.is_contiguous() for t in back.tensors())
    assert torch.equal(back.dequantize(), w4.dequantize())


# ---- a tensor's usual life -----------------------------------------------------------------------------------


@kinds
def test_copy_deepcopy_pickle(quant_type, nested):
    w4 = quantised(5, 33, quant_type=quant_type, nested=nested)
    shallow, deep, thawed = copy.copy(w4), copy.deepcopy(w4), pickle.loads(pickle.dumps(w4))
    for other in (shallow, deep, thawed):
        assert_same_weight(other, w4)
    assert shallow.packed.data_ptr() == w4.packed.data_ptr()
    deep.packed.zero_(), deep.absmax.zero_()
    assert w4.packed.any() and w4.absmax.any()


@kinds
def test_torch_save(quant_type, nested):
    w4, file = quantised(5, 33, quant_type=quant_type, nested=nested), io.BytesIO()
    torch.save(w4, file)
    file.seek(0)
    with torch.serialization.safe_globals([NF4Weight]):
        assert_same_weight(torch.load(file, weights_only=True), w4)


def test_equality_is_identity():
    """Comparing tensors has no one truth value; a dataclass's == would raise."""
    w4, other = quantised(4, 64), quantised(4, 64)
    assert w4 == w4 and w4 != other and w4 in [other, w4] and len({w4, other}) == 2


@kinds
def test_meta(quant_type, nested):
    w4 = quantised(6, 64, quant_type=quant_type, nested=nested)
    meta = w4.to("meta")
    assert meta.device.type == "meta" and all(t is None or t.is_meta for t in meta.tensors())
    assert meta.nbytes == w4.nbytes and meta.dequantize().is_meta and meta.dequantize().shape == (6, 64)
    entries = meta.state_dict()
    shapes = {key: (t.shape, t.dtype) for key, t in w4.state_dict().items() if "quant_state" not in key}
    assert {key: (t.shape, t.dtype) for key, t in entries.items() if "quant_state" not in key} == shapes
    assert all(t.is_meta for t in entries.values())
    with pytest.raises(ValueError, match=r"quant_state.bitsandbytes__.*meta"):
        NF4Weight.from_state_dict(entries)
    mixed = {key: t if "quant_state" in key else t.to("meta") for key, t in w4.state_dict().items()}
    assert NF4Weight.from_state_dict(mixed).device.type == "meta"
    quantised_there = peftk.quantize_nf4(torch.empty(6, 64, device="meta"), double_quant=nested, quant_type=quant_type)
    assert [t is None or (t.shape, t.dtype) for t in quantised_there.tensors()] == [
        t is None or (t.shape, t.dtype) for t in w4.tensors()
    ]


def test_to():
    w4 = quantised(4, 64)
    assert_same_weight(w4.to("cpu"), w4)
    assert_same_weight(w4.to(torch.device("cpu")), w4)
    with pytest.raises(TypeError, match=r"device: expected a device, got torch.float16"):
        w4.to(torch.float16)


# ---- dequantize ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dequantize_out(dtype):
    w4 = quantised(5, 80)
    out = torch.empty(5, 80, dtype=dtype)
    assert w4.dequantize(out=out) is out
    assert torch.equal(out, w4.dequantize(dtype)) and torch.equal(out, w4.dequantize(torch.float32).to(dtype))
    assert w4.dequantize(dtype, out=out) is out
    assert w4.dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(80, 5), ValueError, r"out: expected a contiguous tensor of shape \(5, 80\) on cpu, got \(80, 5\)"),
        (torch.zeros(80, 5).T, ValueError, r"out: expected a contiguous .* got \(5, 80\) with strides \(1, 5\)"),
        (torch.zeros(400), ValueError, r"out: expected a contiguous tensor of shape \(5, 80\)"),
        (torch.zeros(5, 80, device="meta"), ValueError, r"out: .* on cpu, got .* on meta"),
        (torch.zeros(5, 80, dtype=torch.int32), TypeError, r"out: expected a floating-point dtype, got torch.int32"),
    ],
)
def test_dequantize_refuses_out(out, error, message):
    with pytest.raises(error, match=message):
        quantised(5, 80).dequantize(out=out)


def test_dequantize_refuses_dtypes():
    w4 = quantised(5, 80)
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point dtype, got torch.int8"):
        w4.dequantize(torch.int8)
    with pytest.raises(ValueError, match=r"dtype: expected out's torch.float32 or none, got torch.float16"):
        w4.dequantize(torch.float16, out=torch.empty(5, 80))
