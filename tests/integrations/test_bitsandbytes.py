"""bnb.nn.Linear4bit on a CPU with peftk beneath it: right on every shape, its bytes left alone; and all of it put back."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from numerics import assert_no_worse_than_twice_plain, row_scaled

import peftk
from peftk.integrations import bitsandbytes as backend
from peftk.integrations.bitsandbytes import entry, regime, weights
from peftk.replaced import Replacements, held

# (n, k): where bitsandbytes 0.50.2 decodes wrongly (k % 64), crashes in eval mode (n % 32, k % 64), or neither
SHAPES = [(33, 96), (8, 80), (32, 50), (5, 33), (64, 128)]
STORED = ("weight", "weight.absmax", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4")


def layer_of(bnb, n: int, k: int, quant_type: str = "nf4", nested: bool = True, dtype=torch.float32, **options):
    """A Linear4bit with bias on row-scaled weights; they must not have scales alike, or a wrong block would hide."""
    layer = bnb.nn.Linear4bit(k, n, quant_type=quant_type, compress_statistics=nested, compute_dtype=dtype, **options)
    layer.load_state_dict({"weight": row_scaled(n, k), "bias": torch.randn(n)})
    return layer.to("cpu")


def stored(layer: torch.nn.Module) -> torch.Tensor:
    """W in fp64, read by our reference out of the layer's checkpoint."""
    state = {key: value.view(torch.uint8) if key == "weight" else value for key, value in layer.state_dict().items()}
    with peftk.use("reference"):
        return peftk.NF4Weight.from_state_dict(state).dequantize(torch.float32).double()


def as_bytes(layer: torch.nn.Module) -> dict[str, bytes]:
    return {key: value.detach().view(-1).view(torch.uint8).numpy().tobytes() for key, value in layer.state_dict().items()}


def assert_exact(got: torch.Tensor, truth: torch.Tensor) -> None:
    """But for fp32's rounding; a wrong block is 0.3 or more away."""
    assert got.dtype == torch.float32 and got.shape == truth.shape and not got.isnan().any()
    assert (got.double() - truth).norm() <= 1e-6 * truth.norm()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_layer_is_right_on_every_shape(bnb, n: int, k: int, quant_type: str, nested: bool):
    layer = layer_of(bnb, n, k, quant_type, nested)
    w, bias = stored(layer), layer.bias.detach()
    x, dy = torch.randn(2, 9, k, requires_grad=True), torch.randn(2, 9, n)
    y = layer(x)
    dx, dbias = torch.autograd.grad(y, (x, layer.bias), dy)
    assert_exact(y.detach(), x.detach().double() @ w.T + bias.double())
    assert_exact(dx, dy.double() @ w)
    assert torch.allclose(dbias, dy.sum((0, 1)), atol=1e-5)
    layer.eval()
    with torch.no_grad():
        for rows in (x, x[:1, :1], x[:0]):
            one = layer(rows)
            assert one.shape == (*rows.shape[:-1], n)
            assert_exact(one, rows.double() @ w.T + bias.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [3, regime.MANY_ROWS])
def test_16_bits(bnb, m: int, dtype: torch.dtype):
    """Few rows and, where torch has tiles that ours lacks, the dense way."""
    layer = layer_of(bnb, 40, 80, dtype=dtype)
    w, x, dy = stored(layer), torch.randn(m, 80).to(dtype).requires_grad_(), torch.randn(m, 40).to(dtype)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    plain = torch.nn.functional.linear(x, w.to(dtype), layer.bias)
    assert_no_worse_than_twice_plain(y.detach(), plain.detach(), (x.double() @ w.T + layer.bias.double()).detach())
    assert_no_worse_than_twice_plain(dx, dy @ w.to(dtype), dy.double() @ w)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_eval_leaves_every_stored_byte(bnb, storage: torch.dtype):
    layer = layer_of(bnb, 64, 128, quant_storage=storage).eval()
    before, address = as_bytes(layer), layer.weight.data_ptr()
    assert layer.weight.dtype == storage and set(STORED) <= set(before)
    w, x = stored(layer), torch.randn(5, 128)
    with torch.no_grad():
        y = layer(x)
    assert torch.allclose(y.double(), x.double() @ w.T + layer.bias.double(), rtol=1e-4, atol=1e-3)
    assert as_bytes(layer) == before and layer.weight.data_ptr() == address
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_parameters_are_read_where_they_lie(bnb):
    layer = layer_of(bnb, 32, 64)
    parameter, state = layer.weight, layer.weight.quant_state
    w4 = weights.weight_of(parameter, state)
    assert w4.packed.data_ptr() == parameter.data_ptr()
    assert w4.absmax is state.absmax and w4.absmax_scale is state.state2.absmax
    assert weights.weight_of(parameter.t(), state) is w4  # remembered; the transposed view of older versions is the same bytes
    parameter.data = parameter.data.clone()
    assert weights.weight_of(parameter, state).packed.data_ptr() == parameter.data_ptr()
    state.absmax = state.absmax.clone()
    assert weights.weight_of(parameter, state).absmax is state.absmax
    gc.collect()  # a layer and its weight know each other
    known = len(weights._known)
    del layer, parameter, state, w4
    gc.collect()
    assert len(weights._known) == known - 1


def test_foreign_nested_statistics(bnb):
    """A table of other values, and blocks other than 256, are decoded as they say."""
    layer = layer_of(bnb, 16, 128)
    state, x = layer.weight.quant_state, torch.randn(3, 128)
    state.state2.code = torch.linspace(-1, 1, 256)
    scale = (
        state.state2.code[state.absmax.int()] * state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()] + state.offset
    )
    w = peftk.ops.nf4_dequantize(layer.weight.data, scale, None, None, (16, 128))
    assert torch.allclose(layer(x), x @ w.T + layer.bias, rtol=1e-5, atol=1e-5)


def test_a_weight_repacked_before(bnb):
    """A model that was evaluated without us, then with us."""
    if not getattr(bnb.functional, "has_avx512bf16", bool)():  # since 0.49
        pytest.skip("bitsandbytes repacks with AVX512-BF16 only")
    for nested in (True, False):
        layer = layer_of(bnb, 32, 128, nested=nested, dtype=torch.bfloat16).eval()
        x, w = torch.randn(3, 128).bfloat16(), stored(layer)
        truth = x.double() @ w.T + layer.bias.double()
        backend.disable()
        with torch.no_grad():
            layer(x)
        state = layer.weight.quant_state
        assert state.packing_format_for_cpu
        backend.enable()
        direct = bnb.functional.gemv_4bit(x, layer.weight, state=state) + layer.bias
        assert (direct.double() - truth).norm() / truth.norm() < 0.02
        with torch.no_grad():
            y = layer(x)
        assert (y.double() - truth).norm() / truth.norm() < 0.02 and not state.packing_format_for_cpu
        assert state.absmax.dim() == 1


def test_copies_and_moves(bnb):
    layer = layer_of(bnb, 24, 80)
    x, y = torch.randn(4, 80), None
    y = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), y)
    other.weight.data.zero_()
    assert torch.equal(layer(x), y) and not torch.equal(other(x), y)


def test_arguments_of_matmul_4bit(bnb):
    layer = layer_of(bnb, 24, 80)
    state, x, out = layer.weight.quant_state, torch.randn(4, 80), torch.empty(4, 24)
    y = bnb.matmul_4bit(x, layer.weight, quant_state=state, out=out)
    assert y is out and torch.equal(y, bnb.matmul_4bit(x, layer.weight.t(), quant_state=state))
    with pytest.raises((ValueError, AssertionError)):
        bnb.matmul_4bit(x, layer.weight, quant_state=None)
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):  # since 0.50 also x W, of a weight that lies the other way
        with pytest.warns(DeprecationWarning, match="orientation"):
            assert bnb.matmul_4bit(torch.randn(4, 24), layer.weight, quant_state=state).shape == (4, 80)


def test_autocast(bnb):
    layer = layer_of(bnb, 24, 80, dtype=None)
    x = torch.randn(4, 80)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.allclose(y.float(), layer(x), rtol=3e-2, atol=0.5)


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="before torch 2.8 dynamo takes no Params4bit")
def test_compiles(bnb):
    """One graph, forward and backward; nested statistics too."""
    layer = layer_of(bnb, 24, 80)
    x, dy = torch.randn(4, 80, requires_grad=True), torch.randn(4, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted, got = ((y, *torch.autograd.grad(y, x, dy)) for y in (layer(x), compiled(x)))
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


# ---- taking over and putting back --------------------------------------------------------------------------------------------


def test_info_lists_what_is_replaced(bnb):
    names = peftk.info().replaced["bitsandbytes"]
    repacking = "_convert_weight_packed_for_cpu"
    assert "bitsandbytes.matmul_4bit" in names
    assert (f"bitsandbytes.nn.modules.{repacking}" in names) == hasattr(bnb.nn.modules, repacking)  # since 0.49
    assert "torch.ops.bitsandbytes.quantize_4bit (CPU)" in names and len(set(names)) == len(names)
    shown = str(peftk.info())
    assert all(f"  {name}" in shown for name in names)
    backend.enable()  # twice is once
    assert peftk.info().replaced["bitsandbytes"] == names
    backend.disable()
    assert peftk.info().replaced == {} and not backend.is_enabled()


def test_disabling_restores_the_originals():
    bnb = pytest.importorskip("bitsandbytes")
    owners = (bnb, bnb.autograd._functions, bnb.functional, bnb.nn.modules)

    def functions() -> list[dict]:
        return [{name: value for name, value in vars(owner).items() if callable(value)} for owner in owners]

    def facts() -> list:
        """Of an op that both have, each in its own way: an all-zero block at the end, which 0.46 refuses."""
        try:
            packed, absmax = torch.ops.bitsandbytes.quantize_4bit(torch.zeros(8, 9), 64, "nf4", torch.uint8)
        except RuntimeError as error:
            return [str(error)]
        return [packed.tolist(), absmax.tolist()]

    before, result = functions(), facts()
    backend.enable()
    assert functions() != before and facts() != result and facts()[1] == [0, 0]
    backend.disable()
    assert functions() == before and facts() == result
    assert held("bitsandbytes") is None


def test_a_failure_halfway_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    bnb = pytest.importorskip("bitsandbytes")
    original = bnb.matmul_4bit
    monkeypatch.delattr(bnb.autograd._functions, "matmul_4bit")
    with pytest.raises(AttributeError, match="matmul_4bit"):
        backend.enable()
    assert bnb.matmul_4bit is original and not backend.is_enabled() and peftk.info().replaced == {}


def test_versions_out_of_range_are_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    pytest.importorskip("bitsandbytes")
    if reason := backend.reason_against("0.50.2"):
        pytest.skip(reason)
    for version in ("0.45.5", "0.51.0", "1.0", "of unknown version"):
        assert version in backend.reason_against(version)
    assert not backend.reason_against("0.46.0") and not backend.reason_against("0.50.9.dev0")
    monkeypatch.setattr(backend, "installed_version", lambda _: "0.51.0")
    monkeypatch.setenv(entry.SWITCH, "1")
    with caplog.at_level(logging.WARNING, "peftk"):
        entry.register()
    assert "expected >= 0.46 and < 0.51, got 0.51.0" in caplog.text and len(caplog.records) == 1
    assert not backend.is_enabled()


def test_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "native", lambda: None)
    monkeypatch.setattr(backend, "why_not_native", lambda: "no compiler: c++ was not found")
    assert backend.reason_against("0.50.2") == "no compiler: c++ was not found"


def test_the_switch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "enable", lambda: pytest.fail("called"))
    monkeypatch.setenv(entry.SWITCH, "0")
    entry.register()


def test_torch_that_refuses_a_second_kernel(monkeypatch: pytest.MonkeyPatch):
    """Before 2.9 or so Library.impl has no allow_override and refuses a kernel where Python has registered one."""
    original = torch.library.Library.impl

    def older(self, op_name, fn, dispatch_key="", *, with_keyset=False):
        if f"{self.ns}/{op_name}/{dispatch_key}" in torch.library._impls:
            raise RuntimeError("already a kernel registered from python")
        original(self, op_name, fn, dispatch_key, with_keyset=with_keyset)

    own = torch.library.Library("peftk_test_override", "FRAGMENT")
    own.define("f(Tensor x) -> Tensor")
    own.impl("f", lambda x: x + 1, "CPU")
    monkeypatch.setattr(torch.library.Library, "impl", older)
    entries, x = set(torch.library._impls), torch.zeros(1)
    with pytest.raises(RuntimeError, match="already"):
        torch.library.Library("peftk_test_override", "IMPL").impl("f", lambda x: x + 2, "CPU")
    replacements = Replacements("peftk_test_override")
    replacements.kernel("f", lambda x: x + 2)
    assert torch.ops.peftk_test_override.f(x) == 2
    replacements.put_back()
    assert torch.ops.peftk_test_override.f(x) == 1 and set(torch.library._impls) == entries


# ---- where torch's tiles are faster ------------------------------------------------------------------------------------------


def test_the_dense_way_is_for_tiles_that_ours_lacks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    tier = ["avx512_bf16"]
    monkeypatch.setattr(regime, "native", lambda: type("Native", (), {"tier": staticmethod(lambda: tier[0])}))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert regime.dense_dtypes() == {torch.bfloat16, torch.float16}
    tier[0] = "amx_bf16"
    assert regime.dense_dtypes() == {torch.float16}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert regime.dense_dtypes() == frozenset()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert regime.dense_dtypes() == frozenset()
    many = torch.empty(2, regime.MANY_ROWS // 2, 8, dtype=torch.float16)
    assert regime.is_dense(many, frozenset({torch.float16})) and not regime.is_dense(many[:1], frozenset({torch.float16}))
    assert not regime.is_dense(many, frozenset({torch.bfloat16}))
