"""bench/peers.py: absent peers are told, present ones do the same work as ours."""

from pathlib import Path

import pytest
import torch

import peftk
from bench import isa, peers
from bench.measure import relative_error


def test_a_missing_package_is_a_row():
    row = peers.candidate("peer", ["no_such_package_here"], lambda: pytest.fail("built all the same"))
    assert (row.who, row.run, row.note) == ("peer", None, "not installed")


def test_a_package_that_fails_to_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "half_installed_peer.py").write_text("import a_library_of_its_own")
    monkeypatch.syspath_prepend(tmp_path)
    row = peers.candidate("peer", ["half_installed_peer"], lambda: None)
    assert row.run is None and row.note.startswith(
        "half_installed_peer can't be imported: No module named 'a_library_of_its_own'"
    )


def test_a_peer_that_cannot_says_why():
    def make():
        raise peers.Unavailable("needs AVX512-BF16")

    assert peers.candidate("peer", [], make).note == "needs AVX512-BF16"


def test_a_forced_instruction_set_is_told(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("bitsandbytes")
    w4 = peftk.quantize_nf4(torch.randn(64, 64).bfloat16())
    x = torch.randn(1, 64).bfloat16()
    for name, value in isa.FORCED["avx2"].items():
        monkeypatch.setenv(name, value)
    packed = peers.candidate("packed", ["bitsandbytes"], lambda: peers.bnb_linear_packed(w4, x))
    assert packed.run is None and packed.note == "needs AVX512-BF16, and avx2 is forced"
    assert peers.candidate("other", ["bitsandbytes"], lambda: id, note="a note").note == f"a note; {isa.BITSANDBYTES_NOTE}"
    assert peers.candidate("torch", [], lambda: id).note == ""


def test_bitsandbytes_does_the_same_work():
    pytest.importorskip("bitsandbytes")
    w = torch.randn(64, 128).bfloat16()
    w4 = peftk.quantize_nf4(w)
    ours = w4.dequantize()
    out = torch.empty_like(ours)
    assert torch.equal(peers.bnb_dequantize_4bit(w4)(), ours)
    assert torch.equal(peers.bnb_dequantize_4bit(w4, out)(), ours) and torch.equal(out, ours)
    assert torch.equal(peers.bnb_dequantize_4bit_kernel(w4, out.zero_())(), ours) and torch.equal(out, ours)
    assert relative_error(peers.bnb_as_nf4_weight(*peers.bnb_quantize_4bit(w)()).dequantize(), ours.double()) < 0.01


def test_hf_peft_has_our_adapter():
    pytest.importorskip("peft")
    w4 = peftk.quantize_nf4(torch.randn(64, 128).bfloat16())
    x, dy, A, B = torch.randn(8, 128), torch.randn(8, 64), torch.randn(4, 128), torch.randn(64, 4)
    layer, *parameters = peers.hf_lora(peers.dense_linear(w4, torch.float32), A, B, 0.5)
    A.requires_grad_(), B.requires_grad_()
    theirs = peers.forward_backward(layer, x, *parameters, dy)()
    ours = peers.forward_backward(lambda x: peftk.ops.nf4_lora_linear(x, w4, A, B, 0.5), x, A, B, dy)()
    assert len(theirs) == 4
    for result, expected in zip(theirs, ours, strict=True):
        assert relative_error(result, expected.double()) < 1e-5


def test_torch_int4_is_held_against_its_own_weight():
    w, x = torch.randn(64, 128), torch.randn(8, 128).bfloat16()
    run, used = peers.torch_int4(w, x)
    assert relative_error(used, w.double()) < 0.15
    assert relative_error(run(), x.double() @ used.double().T) < 0.01
