"""Damage to files: to bytes of any kind, and to what the bytes mean (JSON, safetensors, torch's zip files, GGUF). A generator of
random numbers decides on all of it, so that a case is the same in every run."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

Files = dict[str, bytes]

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**64, -(2**63), 10**30)
FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-320, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    "x",
    "..",
    "../../x",
    "/etc/passwd",
    "__class__",
    "weight",
    "(",
    "(a+)+$",
    "\x00",
    "\ud800",
    "é" * 40,
    "9" * 400,
    "nf4",
)
ODD = (None, True, False, [], {}, [[]], {"": {}}, [None], ["../x"], [0, -1], [2**40], {"a": 1})


def mutated(files: Files, pick: random.Random) -> Files:
    """The files with one to three mutations of one of them; now and then a file is missing, empty, or another one's bytes."""
    names = sorted(files)
    name = pick.choice(names)
    if pick.random() < 0.02:
        return {
            **{n: b for n, b in files.items() if n != name},
            **pick.choice([{}, {name: b""}, {name: files[pick.choice(names)]}]),
        }
    content = files[name]
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        kinds = [raw, *([f for ending, f in MEANING.items() if name.endswith(ending)] * 3)]
        content = pick.choice(kinds)(content, pick)
    return {**files, name: content}


def raw(content: bytes, pick: random.Random) -> bytes:
    """Bits, bytes, lengths: knows nothing of the format. Half of it in the first bytes, where headers are."""
    data = bytearray(content or b"\0")
    end = len(data) if pick.random() < 0.5 else min(len(data), 256)
    at = pick.randrange(end)
    kind = pick.randrange(9)
    if kind == 0:
        data[at] ^= 1 << pick.randrange(8)
    elif kind == 1:
        data[at] = pick.choice((0, 1, 0x7F, 0x80, 0xFF, pick.randrange(256)))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data += bytes(pick.randrange(256) for _ in range(pick.choice((1, 8, 100))))
    elif kind == 4:  # a run of another place
        there, n = pick.randrange(len(data)), pick.choice((1, 4, 8, 64))
        data[at : at + n] = data[there : there + n]
    elif kind == 5:
        data[at:at] = bytes(pick.choice((1, 2, 8)))
    elif kind == 6:
        del data[at : at + pick.choice((1, 2, 8, 64))]
    else:
        width, layout = pick.choice(((2, "<H"), (4, "<I"), (8, "<Q"), (4, "<f"), (4, ">I")))
        value = pick.choice(FLOATS) if layout == "<f" else pick.choice(NUMBERS) % (1 << 8 * width)
        data[at : at + width] = _packed(layout, value)
    return bytes(data)


def _packed(layout: str, value: float) -> bytes:
    try:
        return struct.pack(layout, value)
    except OverflowError:
        return struct.pack(layout, float("inf"))


def in_json(content: bytes, pick: random.Random) -> bytes:
    """One node of the tree becomes another, goes, or comes twice; now and then the text nests too deep."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return raw(content, pick)
    if pick.random() < 0.03:
        depth = pick.choice((50, 2000, 200_000))
        return pick.choice((b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth))
    text = json.dumps(in_tree(tree, pick))
    if pick.random() < 0.05 and text.startswith("{") and len(text) > 2:  # a key twice
        key, value = pick.choice(sorted(tree.items(), key=lambda item: item[0])) if isinstance(tree, dict) and tree else ("a", 1)
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(other_value(value, pick))}}}"
    return text.encode("utf-8", "surrogatepass")


def in_tree(tree: Any, pick: random.Random) -> Any:
    """A copy with one change at a random place."""
    places = list(_places(tree))
    if not places:
        return other_value(tree, pick)
    path = pick.choice(places)
    tree = json.loads(json.dumps(tree))
    at = tree
    for step in path[:-1]:
        at = at[step]
    last, kind = path[-1], pick.random()
    if kind < 0.15:
        del at[last]
    elif kind < 0.25 and isinstance(at, dict):
        at[pick.choice((f"{last}x", f"{last}.", str(last).upper(), *TEXTS))] = at.pop(last)
    elif kind < 0.35 and isinstance(at, list):
        at.insert(last, at[pick.randrange(len(at))])
    elif kind < 0.45:
        at[last] = _at(tree, pick.choice(places))
    else:
        at[last] = other_value(at[last], pick)
    return tree


def other_value(value: Any, pick: random.Random) -> Any:
    """Of the same kind most of the time."""
    if pick.random() < 0.25:
        return pick.choice((*ODD, *NUMBERS, *FLOATS, *TEXTS))
    if isinstance(value, bool):
        return pick.choice((not value, int(value), str(value)))
    if isinstance(value, int):
        return pick.choice((*NUMBERS, value + 1, value - 1, 2 * value, -value, float(value), str(value)))
    if isinstance(value, float):
        return pick.choice((*FLOATS, -value, value * 2, int(value) if abs(value) < 1e9 else 0))
    if isinstance(value, str):
        return pick.choice((*TEXTS, value + "x", value[1:], value * 2, value.upper()))
    return pick.choice(ODD)


def _places(tree: Any, path: tuple = ()) -> Any:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from _places(child, (*path, key))


def _at(tree: Any, path: tuple) -> Any:
    for step in path:
        tree = tree[step]
    return json.loads(json.dumps(tree))


def in_safetensors(content: bytes, pick: random.Random) -> bytes:
    """Of the header a node, of the length a value; or whole tensors change."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    except (struct.error, ValueError, RecursionError):
        return raw(content, pick)
    kind = pick.random()
    if kind < 0.1:
        length = pick.choice((*NUMBERS, length + 1, length - 1, length + len(data))) % (1 << 64)
        return struct.pack("<Q", length) + content[8:]
    if kind < 0.5 and isinstance(header, dict):
        text = json.dumps(in_tree(header, pick)).encode("utf-8", "surrogatepass")
        text += b" " * pick.choice((0, -len(text) % 8))
        return struct.pack("<Q", len(text)) + text + data
    if kind < 0.6:
        return content[: 8 + length] + raw(data, pick)
    tensors = _read(content)
    if tensors is None:
        return raw(content, pick)
    from safetensors.torch import save

    return save(other_state(tensors, pick), metadata=header.get("__metadata__"))


def _read(content: bytes) -> dict[str, torch.Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(sorted(load(content).items()))  # safetensors has them in another order each time
    except (SafetensorError, KeyError, ValueError):
        return None


def other_tensor(tensor: torch.Tensor, pick: random.Random) -> torch.Tensor:
    """Of another dtype or shape, or with another value somewhere."""
    kind = pick.randrange(7)
    if kind == 0:
        return tensor.to(pick.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)))
    if kind == 1:
        return tensor.reshape(pick.choice([(-1,), (1, *tensor.shape), (*tensor.shape, 1), tensor.shape[::-1]])).clone()
    if kind == 2:
        return tensor.reshape(-1)[: pick.randrange(tensor.numel() + 1)].clone()
    if kind == 3:
        return torch.cat([tensor, tensor]) if tensor.dim() else tensor.expand(3).clone()
    if kind == 4:
        return tensor.new_zeros(pick.choice([(), (0,), (1,), (0, 3), (7, 1)]))
    if tensor.numel() and tensor.element_size():
        changed = tensor.clone().contiguous()
        flat = changed.reshape(-1)
        value = pick.choice(FLOATS) if tensor.is_floating_point() else pick.randrange(2 if tensor.dtype == torch.bool else 128)
        flat[pick.randrange(flat.numel())] = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
        return changed
    return tensor.clone()


def other_state(state: dict[Any, Any], pick: random.Random) -> dict[Any, Any]:
    """A flat dict of tensors with one change."""
    if not state:
        return {"x": torch.zeros(1)}
    state = {key: value.clone() for key, value in state.items()}
    name = pick.choice(list(state))
    kind = pick.random()
    if kind < 0.15:
        del state[name]
    elif kind < 0.3:
        state[pick.choice((f"{name}x", str(name).replace("0", "1"), str(name).replace("A", "B"), *TEXTS[:6]))] = state.pop(name)
    elif kind < 0.4:
        state[name] = state[pick.choice(list(state))].clone()
    else:
        state[name] = other_tensor(state[name], pick)
    return state


def in_torch(content: bytes, pick: random.Random) -> bytes:
    """A file of torch.save: the object in it, its pickle, or the zip around it."""
    kind = pick.random()
    if kind < 0.6:
        try:
            found = torch.load(io.BytesIO(content), weights_only=True)
        except Exception:  # of a file that was damaged already, whatever the unpickler stumbles over
            return raw(content, pick)
        made = io.BytesIO()
        torch.save(in_object(found, pick), made)
        return made.getvalue()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = {info.filename: archive.read(info) for info in archive.infolist()}
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, NotImplementedError, RuntimeError, EOFError):
        return raw(content, pick)
    if not parts:
        return raw(content, pick)
    name = pick.choice([n for n in parts if n.endswith("data.pkl")] * 3 + list(parts))
    if pick.random() < 0.1:
        del parts[name]
    else:
        parts[name] = raw(parts[name], pick)
    made = io.BytesIO()
    packing = pick.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(made, "w") as archive:
        for part, data in parts.items():
            archive.writestr(zipfile.ZipInfo(part), data, packing)  # a name alone would bring the time of day
    return made.getvalue()


def in_object(tree: Any, pick: random.Random) -> Any:
    """A copy of a tree of dicts, lists and tensors with one change."""
    places = list(_places(tree))
    if not places:
        return other_value(tree, pick)
    path = pick.choice(places)
    tree = _copied(tree)
    at = tree
    for step in path[:-1]:
        at = at[step]
    last, kind = path[-1], pick.random()
    if kind < 0.15:
        del at[last]
    elif kind < 0.25 and isinstance(at, dict):
        at[pick.choice((f"{last}x", 99, -1, "", None))] = at.pop(last)
    elif kind < 0.35:
        other = tree
        for step in pick.choice(places):
            other = other[step] if isinstance(other, dict | list) and (isinstance(other, dict) or step < len(other)) else other
        at[last] = _copied(other)
    elif isinstance(at[last], torch.Tensor) and pick.random() < 0.8:
        at[last] = other_tensor(at[last], pick)
    else:
        at[last] = other_value(at[last], pick)
    return tree


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copied(value) for value in tree]
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


def in_binary(content: bytes, pick: random.Random) -> bytes:
    """GGUF, CTranslate2, WAV: the numbers are little-endian among texts. One of them near the front becomes another one."""
    data = bytearray(content)
    if len(data) < 16:
        return raw(content, pick)
    width = pick.choice((1, 2, 4, 4, 8, 8))
    end = min(len(data), pick.choice((48, 512, 4096, len(data)))) - width
    at = pick.randrange(max(end, 1))
    old = int.from_bytes(data[at : at + width], "little")
    new = pick.choice((*NUMBERS, old + 1, old - 1, 2 * old, old << 8)) % (1 << 8 * width)
    data[at : at + width] = new.to_bytes(width, "little")
    return bytes(data)


def in_lines(content: bytes, pick: random.Random) -> bytes:
    """JSONL: a line as JSON."""
    lines = content.split(b"\n")
    at = pick.randrange(len(lines))
    lines[at] = in_json(lines[at], pick)
    return b"\n".join(lines)


MEANING: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": in_json,
    ".jsonl": in_lines,
    ".safetensors": in_safetensors,
    ".bin": in_torch,
    ".pt": in_torch,
    ".gguf": in_binary,
    "ct2/model.bin": in_binary,
    ".wav": in_binary,
}
