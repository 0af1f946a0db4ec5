"""Reading bitsandbytes' entries: whatever a file holds, a ValueError that names the field, or a weight that fits together."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import row_scaled

import peftk
from peftk import NF4Weight
from peftk.format.checkpoint4 import read_entries
from peftk.format.code4 import values4
from peftk.format.dynamic8 import values8

STATE = "p.weight.quant_state.bitsandbytes__nf4"


def good_entries(nested: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return peftk.quantize_nf4(row_scaled(20, 80, dtype=torch.bfloat16), double_quant=nested).state_dict("p.")


def with_facts(**changes) -> dict[str, torch.Tensor]:
    """A good file, some of its JSON's fields changed; ... takes one out."""
    entries = good_entries()
    facts = {**json.loads(bytes(entries[STATE].tolist())), **changes}
    return with_json(json.dumps({k: v for k, v in facts.items() if v is not ...}).encode())


def with_json(text: bytes) -> dict[str, torch.Tensor]:
    return {**good_entries(), STATE: torch.tensor(list(text), dtype=torch.uint8)}


def with_entry(key: str, change, nested: bool = True) -> dict[str, torch.Tensor]:
    entries = good_entries(nested)
    entries[f"p.{key}"] = change(entries[f"p.{key}"]) if callable(change) else change
    return entries


def without(key: str) -> dict[str, torch.Tensor]:
    return {k: t for k, t in good_entries().items() if k != f"p.{key}"}


def nudge(table: torch.Tensor) -> torch.Tensor:
    """One entry one ulp off."""
    table = table.clone()
    table[3] = torch.nextafter(table[3], torch.tensor(2.0))
    return table


def poke(table: torch.Tensor) -> torch.Tensor:
    table = table.clone()
    table[5] = float("nan")
    return table


FIELDS = {
    "quant_type": ["fp4", "int4", "", None, 1, True, ["nf4"], {}, ...],
    "blocksize": [0, 48, -64, 63, 16, 8192, 128, 64.0, "64", True, None, [64], 10**30, ...],
    "dtype": ["torch.bfloat16", "int8", "complex64", "", None, 1, ["bfloat16"], {"a": 1}, ...],
    "shape": [[80], [20, 81], [], [-20, -80], [20, 80.0], [20, True], [20, None], ["20", 80], [[20, 80]], "20, 80", None, 1600,
              {}, [2**62, 2**62], [2**63, 0], [10**400], [0, 2**62, 8], ...],
    "nested_blocksize": [0, 64, 255, 256.0, "256", True, None, ...],
    "nested_dtype": ["bfloat16", "torch.float32", None, 1, [], ...],
    "nested_offset": [float("nan"), float("inf"), -float("inf"), 1e39, -1e300, 10**400, "0.1", None, True, [0.1], ...],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in FIELDS.items() for v in values], ids=lambda v: repr(v)[:24])
def test_refuses_a_wrong_fact(field, value):
    with pytest.raises(ValueError) as caught:
        read_entries(with_facts(**{field: value}), "p.")
    message = str(caught.value)
    if field == "shape" and isinstance(value, list) and value in ([80], [20, 81], []) or (field, value) == ("blocksize", 128):
        assert message.startswith(("p.weight: expected", "p.weight.absmax: expected"))  # fits by itself, not the other fields
    else:
        assert STATE in message and field in message


JSONS = {
    "empty": b"",
    "not JSON": b"{quant_type: nf4}",
    "cut short": b'{"quant_type": "nf4", "blocksize": 64',
    "not UTF-8": b'{"quant_type": "\xff\xfe"}',
    "UTF-16": '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [20, 80]}'.encode("utf-16"),
    "a list": b"[1, 2]",
    "a string": b'"nf4"',
    "null": b"null",
    "a number": b"1e400",
    "NaN": b"NaN",
    "an empty object": b"{}",
    "deep": b"[" * 100_000,
    "a very long number": b'{"blocksize": ' + b"9" * 5000 + b"}",
    "a field twice": b'{"quant_type": "nf4", "blocksize": 64, "blocksize": 64, "dtype": "bfloat16", "shape": [20, 80]}',
    "an extra field": b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [20, 80], "more": 1}',
}


@pytest.mark.parametrize("text", JSONS.values(), ids=JSONS.keys())
def test_refuses_wrong_json(text):
    with pytest.raises(ValueError, match=STATE.replace(".", r"\.")):
        read_entries(with_json(text), "p.")


# What happens to an entry (callable: of the good tensor; ...: it is taken out; else put in its place), and how the error begins.
FP4_TABLE = values4("fp4", torch.device("cpu"))
PACKED, NESTED_ABSMAX = "expected 800 values of torch.uint8", "expected 1 values of torch.float32"
CODES16, CODES256 = "expected the 16 values of the code", "expected the 256 values of the code"
CORRUPT = [
    ("weight", lambda t: t[:-1], PACKED),
    ("weight", lambda t: torch.cat([t, t[:1]]), PACKED),
    ("weight", lambda t: t[:0], PACKED),
    ("weight", lambda t: t.long(), PACKED),
    ("weight", lambda t: t.bool(), "expected packed codes"),
    ("weight", lambda t: t.to(torch.complex64), "expected packed codes"),
    ("weight", lambda t: t.float().to_sparse(), "expected a dense tensor"),
    ("weight", [1, 2], "expected a dense tensor"),
    ("weight", ..., "expected it beside exactly one"),
    ("weight.absmax", lambda t: t.float(), "expected 25 values of torch.uint8"),
    ("weight.absmax", lambda t: t[1:], "expected 25 values"),
    ("weight.absmax", lambda t: t[:, None], "expected 25 values"),
    ("weight.absmax", lambda t: t.to("meta"), "expected it on cpu as p.weight, got meta"),
    ("weight.absmax", None, "expected a dense tensor"),
    ("weight.absmax", ..., "missing parts"),
    ("weight.nested_absmax", lambda t: t.bfloat16(), NESTED_ABSMAX),
    ("weight.nested_absmax", lambda t: t.repeat(2), NESTED_ABSMAX),
    ("weight.nested_absmax", lambda t: t[0], NESTED_ABSMAX),
    ("weight.nested_absmax", lambda t: t.to("meta"), "expected it on cpu as p.weight, got meta"),
    ("weight.nested_absmax", ..., "missing parts"),
    ("weight.quant_map", nudge, CODES16),
    ("weight.quant_map", poke, CODES16),
    ("weight.quant_map", FP4_TABLE, CODES16),
    ("weight.quant_map", lambda t: t[:15], "expected 16 values of torch.float32"),
    ("weight.quant_map", lambda t: t.double(), "expected 16 values of torch.float32"),
    ("weight.quant_map", ..., "missing parts"),
    ("weight.nested_quant_map", nudge, CODES256),
    ("weight.nested_quant_map", values8(False), CODES256),
    ("weight.nested_quant_map", lambda t: t[:255], "expected 256 values of torch.float32"),
    ("weight.nested_quant_map", ..., "missing parts"),
    (STATE[2:], lambda t: t.long(), "expected JSON as a row of uint8"),
    (STATE[2:], lambda t: t.float(), "expected JSON as a row of uint8"),
    (STATE[2:], lambda t: t[None], "expected JSON as a row of uint8"),
    (STATE[2:], lambda t: t.to("meta"), "expected JSON as a row of uint8"),
    (STATE[2:], "{}", "expected a dense tensor"),
    (STATE[2:], ..., "expected it beside exactly one"),
    ("weight.more", torch.zeros(1), "unexpected parts"),
]


@pytest.mark.parametrize(("key", "change", "message"), CORRUPT, ids=[f"{i}-{key}" for i, (key, *_) in enumerate(CORRUPT)])
def test_refuses_a_corrupt_entry(key, change, message):
    entries = {k: t for k, t in with_entry(key, change).items() if t is not ...}
    with pytest.raises(ValueError) as caught:
        read_entries(entries, "p.")
    about_the_whole = message.startswith(("missing", "unexpected")) or "beside" in message
    assert str(caught.value).startswith("p.weight: " if about_the_whole else f"p.{key}: ")
    assert message in str(caught.value) and key.removeprefix("weight.").removesuffix("nf4") in str(caught.value)


@pytest.mark.parametrize("change", [torch.Tensor.byte, torch.Tensor.bfloat16, torch.Tensor.double, lambda t: t[:-1]])
def test_refuses_plain_constants_of_another_kind(change):
    with pytest.raises(ValueError, match="p.weight.absmax: expected 25 values of torch.float32"):
        read_entries(with_entry("weight.absmax", change, nested=False), "p.")


def test_refuses_codes_on_meta_beside_real_constants():
    with pytest.raises(ValueError, match="p.weight.absmax: expected it on meta as p.weight, got cpu"):
        read_entries(with_entry("weight", lambda t: t.to("meta")), "p.")


FP4_STATE = STATE.replace("nf4", "fp4")
MISMATCHED = {
    "two JSONs": (lambda: {**good_entries(), FP4_STATE: good_entries()[STATE]}, "p.weight: expected it beside exactly one"),
    "the JSON of another type": (
        lambda: {**without(STATE[2:]), FP4_STATE: good_entries()[STATE]},
        "bitsandbytes__fp4: field quant_type: expected fp4, got 'nf4'",
    ),
    "an unknown type": (
        lambda: {**without(STATE[2:]), STATE.replace("nf4", "int4"): good_entries()[STATE]},
        "bitsandbytes__int4: field quant_type: expected int4, got 'nf4'",
    ),
    "nested parts, plain JSON": (
        lambda: {**good_entries(), STATE: good_entries(False)[STATE]},
        r"p.weight: missing parts \[\], unexpected parts \['nested_absmax', 'nested_quant_map'\]",
    ),
    "plain parts, nested JSON": (
        lambda: {**good_entries(False), STATE: good_entries()[STATE]},
        r"p.weight: missing parts \['nested_absmax', 'nested_quant_map'\]",
    ),
    "half the nested fields": (lambda: with_facts(nested_offset=...), f"{STATE}: expected the fields"),
    "nothing": (dict, "p.weight: expected it beside exactly one"),
}


@pytest.mark.parametrize(("make", "message"), MISMATCHED.values(), ids=MISMATCHED.keys())
def test_refuses_parts_that_do_not_belong_together(make, message):
    with pytest.raises(ValueError, match=message):
        read_entries(make(), "p.")


def test_shapes_of_nothing_have_bounds():
    """With a size of 0 every other size fits the bytes; a tensor's can't."""
    entries = peftk.quantize_nf4(torch.zeros(0, 8)).state_dict()
    key = "weight.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(entries[key].tolist()))
    for shape in ([0, 2**70], [0, 2**62, 8], [2**63, 0]):
        text = json.dumps({**facts, "shape": shape}).encode()
        with pytest.raises(ValueError, match="field shape: expected a list of sizes"):
            read_entries({**entries, key: torch.tensor(list(text), dtype=torch.uint8)}, "")


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(0, 300), st.floats(), st.text(max_size=8),
    st.sampled_from(["nf4", "fp4", "bfloat16", "float32", 64, 256, [20, 80], [40, 40], [1600], 0.5]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=2), max_leaves=4
)
fuzz = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))


def refused_or_usable(entries: dict) -> None:
    """Whatever the file: a ValueError, or a weight that decodes to its shape."""
    try:
        w4 = NF4Weight.from_state_dict(entries, "p.")
    except ValueError:
        return
    assert w4.dequantize().shape == w4.shape


@fuzz
@given(facts=st.dictionaries(st.sampled_from([*FIELDS, "more"]), values, max_size=4), taken=st.sets(st.sampled_from([*FIELDS])))
def test_fuzz_facts(facts, taken):
    refused_or_usable(with_facts(**{**dict.fromkeys(taken - {"quant_type", "dtype"}, ...), **facts}))


@fuzz
@given(position=st.integers(0, 149), byte=st.integers(0, 255), length=st.integers(0, 160))
def test_fuzz_json_bytes(position, byte, length):
    text = bytearray(bytes(good_entries()[STATE].tolist())[:length].ljust(position + 1, b" "))
    text[position] = byte
    refused_or_usable(with_json(bytes(text)))


NAMES = ("uint8", "int8", "int16", "int64", "float16", "bfloat16", "float32", "float64", "bool", "complex64")


@fuzz
@given(
    key=st.sampled_from(sorted(k.removeprefix("p.") for k in good_entries())),
    shape=st.lists(st.sampled_from([0, 1, 2, 16, 25, 200, 256, 400, 800]), max_size=2),
    dtype=st.sampled_from([getattr(torch, name) for name in NAMES]),
    device=st.sampled_from(["cpu", "cpu", "cpu", "meta"]),
)
def test_fuzz_tensors(key, shape, dtype, device):
    refused_or_usable(with_entry(key, torch.ones(shape, device=device).to(dtype)))
