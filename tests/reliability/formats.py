"""What the fuzzer reads, and what must hold of a file that was taken: it passes its own checks, and saved again it is the same.

A ``Format`` has samples (good files), ``load`` (may refuse, with one of ``refusals``) and ``check`` (may not fail on what
``load`` gave). model_formats.py has those that need transformers.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tiny_models import Net, fill
from torch import nn

import peftk
from peftk.checkpoint import adapter_tensors
from peftk.cli import jsonl
from peftk.cli.audio import read_wave
from peftk.cli.errors import UserError
from peftk.cli.resume import restore
from peftk.integrations.adapter_state import MARK, adapter_state, read_state
from peftk.nn import NF4Linear
from peftk.nn.sharding import constants_as_parameters
from tests.reliability.mutate import Files

GIVEN = (ValueError, FileNotFoundError)  # what functions raise for what they were given


@dataclass(frozen=True)
class Format:
    """``weight``: its share of all cases, against the others'."""

    name: str
    weight: int
    samples: Callable[[], list[Files]]
    load: Callable[[Path], Any]
    check: Callable[[Any, Path], None]
    refusals: tuple[type[Exception], ...] = GIVEN


class WrongState(AssertionError):
    """What was refused has changed something all the same, or what was taken is not what the file says."""


def holds(condition: bool, message: str) -> None:
    if not condition:
        raise WrongState(message)


def bits(tensor: torch.Tensor) -> tuple:
    """Equal where two tensors are, NaN included."""
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(tree: Any) -> Any:
    """The same of every tensor in a tree; numbers by their text, since NaN differs from itself."""
    if isinstance(tree, torch.Tensor):
        return bits(tree)
    if isinstance(tree, dict):
        return {key: all_bits(value) for key, value in tree.items()}
    return [all_bits(value) for value in tree] if isinstance(tree, list | tuple) else repr(tree)


def read_folder(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def written(write: Callable[[Path], Any]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return read_folder(Path(folder))


# ---- one weight, in bitsandbytes' keys ------------------------------------------------------------------------------


def weights() -> Iterator[peftk.NF4Weight]:
    generator = torch.Generator().manual_seed(1)
    for shape, options in (
        ((7, 96), {}),
        ((5, 7), {"double_quant": False}),
        ((300, 64), {"block_size": 64, "quant_type": "fp4"}),
        ((2, 3, 33), {"block_size": 32}),
        ((3, 5000), {"block_size": 4096, "double_quant": False}),
    ):
        yield peftk.quantize_nf4(torch.randn(shape, generator=generator).bfloat16(), **options)


def load_weight(folder: Path) -> peftk.NF4Weight:
    return peftk.NF4Weight.from_state_dict(load_file(folder / "weight.safetensors"), "layer.")


def check_weight(w4: peftk.NF4Weight, folder: Path) -> None:
    w = w4.dequantize(torch.float32)
    holds(w.shape == w4.shape, "dequantize gives another shape")
    ours, theirs = w4.state_dict("layer."), load_file(folder / "weight.safetensors")
    state = f"layer.weight.quant_state.bitsandbytes__{w4.quant_type}"
    for key in set(ours) - {state, "layer.weight"}:
        is_table = key.endswith("quant_map")  # whose zero may be -0
        same = torch.equal(ours[key], theirs[key]) if is_table else bits(ours[key]) == bits(theirs[key])
        holds(same, f"{key}: not the file's bytes")
    holds(bits(ours["layer.weight"])[2] == bits(theirs["layer.weight"])[2], "not the file's codes")
    again = peftk.NF4Weight.from_state_dict(ours, "layer.")
    holds(all_bits(vars(again)) == all_bits(vars(w4)), "saved again it is another weight")


# ---- one layer's state dict -----------------------------------------------------------------------------------------


def layer(form: str) -> NF4Linear:
    torch.manual_seed(2)
    made = NF4Linear(96, 7, bias=True)
    return constants_as_parameters(made) if form == "split" else made


def layer_samples() -> list[Files]:
    samples = []
    for form in ("whole", "split"):
        state = {key: value.clone() for key, value in layer(form).state_dict().items()}
        samples.append({f"{form}.safetensors": save(state)})
    return samples


def load_layer(folder: Path) -> NF4Linear:
    path = next(iter(folder.glob("*.safetensors")), folder / "whole.safetensors")
    made = layer(path.stem)
    try:
        made.load_state_dict(load_file(path))
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        holds(bool(torch.isfinite(made(torch.ones(2, 96))).all()) or "bias" not in str(error), "refused, and no use any more")
        raise ValueError(str(error)) from error
    return made


def check_layer(made: NF4Linear, folder: Path) -> None:
    holds(made(torch.ones(2, 96)).shape == (2, 7), "gives another shape")
    other = layer(next(iter(folder.glob("*.safetensors"))).stem)
    other.load_state_dict(made.state_dict())
    holds(all_bits(other.state_dict()) == all_bits(made.state_dict()), "saved again it is another layer")


# ---- adapters on a model without transformers -----------------------------------------------------------------------

ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peftk.LoraConfig(r=3, target_modules=["q", "v", "embed"], rank_pattern={"layers.1.q": 2}),
    "dora": lambda: peftk.LoraConfig(
        r=2, target_modules="all-linear", use_dora=True, use_rslora=True, modules_to_save=["head"], alpha_pattern={"q": 3.0}
    ),
    "bias": lambda: peftk.LoraConfig(r=1, target_modules=r"layers\.\d\.v", bias="all", exclude_modules=["nothing"]),
    "adalora": lambda: peftk.AdaLoraConfig(init_r=3, target_r=2, tinit=1, tfinal=1, total_step=9, target_modules=["q", "out.0"]),
}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapter_samples() -> list[Files]:
    samples = []
    for make in ADAPTERS.values():
        samples.append(written(lambda folder, make=make: peftk.save_adapter(fill(peftk.attach(net(), make())), folder / "a")))
    old = dict(samples[0])
    made = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "t.safetensors").write_bytes(old.pop("a/adapter_model.safetensors"))
        torch.save(load_file(path), made)
    return [*samples, {**old, "a/adapter_model.bin": made.getvalue()}]


def loaded(model: nn.Module, folder: Path, is_trainable: bool = False) -> nn.Module:
    """The model with the adapter; where it is refused, the model is as it was."""
    before = [(path, id(module)) for path, module in model.named_modules()]
    flags = [(id(p), p.requires_grad) for p in model.parameters()]
    values = all_bits(model.state_dict())
    try:
        return peftk.load_adapter(model, folder, is_trainable=is_trainable)
    except BaseException:
        holds(before == [(path, id(module)) for path, module in model.named_modules()], "refused, and modules have changed")
        holds(flags == [(id(p), p.requires_grad) for p in model.parameters()], "refused, and parameters have changed")
        holds(values == all_bits(model.state_dict()), "refused, and values have changed")
        raise


def check_adapter(model: nn.Module, fresh: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> None:
    """It runs; saved and loaded again it is the same."""
    shape = run(model).shape
    with tempfile.TemporaryDirectory() as folder:
        peftk.save_adapter(model, folder)
        again = peftk.load_adapter(fresh, folder)
    ours, theirs = adapter_tensors(model, "default"), adapter_tensors(again, "default")
    holds(all_bits(ours) == all_bits(theirs), "saved again it has other tensors")
    holds(run(again).shape == shape, "saved again it gives another shape")


def run_net(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(11).view(1, 11))


# ---- all adapters of a model in one file of torch's -----------------------------------------------------------------


def state_model(seed: int) -> nn.Module:
    model = peftk.attach(net(), ADAPTERS["lora"]())
    return fill(peftk.attach(model, ADAPTERS["bias"](), "second"), seed=seed)


def state_samples() -> list[Files]:
    return [written(lambda folder: torch.save(adapter_state(state_model(5)), folder / "adapters.pt"))]


def load_state(folder: Path) -> nn.Module:
    model = state_model(6)
    before = all_bits(model.state_dict())
    try:
        read_state(model, folder / "adapters.pt")
    except BaseException:
        holds(before == all_bits(model.state_dict()), "refused, and values have changed")
        raise
    return model


def check_state(model: nn.Module, folder: Path) -> None:
    run_net(model)
    file = torch_file(folder / "adapters.pt")
    for name, tensor in adapter_state(model).items():
        if name == MARK:
            continue
        holds(bits(file[name].to(tensor.dtype)) == bits(tensor), f"{name}: not the file's")


# ---- optimizers -----------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adamw": lambda p: peftk.optim.AdamW(p, lr=1e-3),
    "adamw8": lambda p: peftk.optim.AdamW8bit(p, lr=1e-3, min_8bit_size=256),
    "lion8": lambda p: peftk.optim.Lion(p, lr=1e-4, bits=8, min_8bit_size=256),
    "ademamix": lambda p: peftk.optim.AdEMAMix(p, lr=1e-3, bits=8, min_8bit_size=256),
}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((9, 40), (5,), ())]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator)
    return made


def optimizer_samples() -> list[Files]:
    samples = []
    for name, make in OPTIMIZERS.items():
        optimizer = make(parameters())
        optimizer.step()
        samples.append(written(lambda folder, o=optimizer, n=name: torch.save(o.state_dict(), folder / f"{n}.pt")))
    return samples


def torch_file(path: Path) -> Any:
    """By torch's own reader, whose errors are its own affair."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"torch.load: {error}") from error


def load_optimizer(folder: Path) -> torch.optim.Optimizer:
    path = next(iter(folder.glob("*.pt")), folder / "adamw.pt")
    state = torch_file(path)
    optimizer = OPTIMIZERS[path.stem](parameters())
    optimizer.step()
    before = all_bits(optimizer.state_dict())
    try:
        optimizer.load_state_dict(state)
    except BaseException:
        holds(before == all_bits(optimizer.state_dict()), "refused, and the state has changed")
        raise
    return optimizer


def check_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    state = optimizer.state_dict()
    other = OPTIMIZERS[next(iter(folder.glob("*.pt"))).stem](parameters())
    other.load_state_dict(state)
    holds(all_bits(other.state_dict()) == all_bits(state), "saved again it is another state")
    optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor) and not key.startswith(("absmax", "qmap")):
                    holds(value.shape == p.shape, f"{key}: {tuple(value.shape)} for a parameter of {tuple(p.shape)}")


# ---- from where peftk finetune goes on ------------------------------------------------------------------------------


def resumed() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = peftk.attach(net(), ADAPTERS["adalora"]())
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=1e-3)
    return model, optimizer, peftk.adalora_schedule(model, optimizer)


def resume_samples() -> list[Files]:
    from peftk.cli.resume import save_checkpoint
    from peftk.cli.training import Progress, Row

    model, optimizer, schedule = resumed()
    for _ in range(3):
        run = model(torch.arange(11).view(1, 11))
        run.square().mean().backward()
        optimizer.step()
    rows = [Row(0, 0, None, None, None, 3.5, {"accuracy": 0.5}), Row(3, 9, 1e-3, 1 / 3, 0.1, None)]
    progress = Progress(3, rows, 99, 1.5)
    return [written(lambda folder: save_checkpoint(folder, model, optimizer, progress, schedule))]


RESUME = "checkpoints/step-000003"


def load_resume(folder: Path) -> Any:
    model = loaded(net(), folder / RESUME / "adapter", is_trainable=True)
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=1e-3)
    schedule = peftk.adalora_schedule(model, optimizer)
    return restore(folder / RESUME, optimizer, schedule), model, optimizer


def check_resume(found: Any, folder: Path) -> None:
    progress, model, optimizer = found
    holds(isinstance(progress.step, int) and all(isinstance(row.step, int) for row in progress.rows), "steps are no integers")
    progress.tokens_per_second + 0.0  # noqa: B018
    model(torch.arange(11).view(1, 11)).square().mean().backward()
    try:
        optimizer.step()
    except ValueError as error:  # weights of 1e38
        holds("expected finite gradients" in str(error), str(error))


# ---- records and recordings -----------------------------------------------------------------------------------------


def record_samples() -> list[Files]:
    return [
        {"data.jsonl": b'{"source": "a b", "target": "c"}\n\n{"source": "d", "target": "e f"}\n'},
        {"data.jsonl": b'{"tokens": ["a", "b"], "tags": ["O", "B-X"]}\n{"tokens": ["c"], "tags": ["O"]}\n'},
    ]


def load_records(folder: Path) -> list:
    found = []
    for where, record in jsonl.read_records(folder / "data.jsonl", "'source'"):
        found.append(jsonl.text_of(record, "source", where) if "source" in record else jsonl.texts_of(record, "tokens", where))
    return found


def check_records(found: list, folder: Path) -> None:
    for entry in found:
        texts = [entry] if isinstance(entry, str) else entry
        holds(all(isinstance(text, str) and text.strip() for text in texts), "no text")
        for text in texts:
            text.encode()


def wave_samples() -> list[Files]:
    import numpy as np
    from task_models import tone, write_wave

    stereo = np.stack([tone(300, 0.05), tone(500, 0.05)], axis=1)
    facts = [(tone(300, 0.05), {}), (tone(300, 0.05), {"width": 1}), (stereo, {"width": 3, "channels": 2})]
    return [written(lambda folder, s=s, f=f: write_wave(folder / "a.wav", s, **f)) for s, f in facts]


def check_wave(samples: torch.Tensor, folder: Path) -> None:
    holds(samples.dtype == torch.float32 and samples.dim() == 1 and bool(torch.isfinite(samples).all()), "no samples")
    holds(0 < len(samples) <= 16000, f"{len(samples)} samples of at most one second at 16 kHz")


FORMATS = (
    Format("nf4_weight", 28, lambda: [{"weight.safetensors": save(w.state_dict("layer."))} for w in weights()], load_weight,
           check_weight, (*GIVEN, SafetensorError)),
    Format("nf4_linear", 14, layer_samples, load_layer, check_layer, (*GIVEN, SafetensorError)),
    Format("adapter", 12, adapter_samples, lambda folder: loaded(net(), folder / "a"),
           lambda model, folder: check_adapter(model, net(), run_net)),
    Format("adapter_state", 3, state_samples, load_state, check_state),
    Format("optimizer", 19, optimizer_samples, load_optimizer, check_optimizer, (*GIVEN, TypeError)),
    Format("resume", 5, resume_samples, load_resume, check_resume, (*GIVEN, UserError)),
    Format("records", 8, record_samples, load_records, check_records, (UserError,)),
    Format("wave", 8, wave_samples, lambda folder: read_wave(folder / "a.wav", 16000, 1.0, "--data line 1"), check_wave,
           (UserError,)),
)  # fmt: skip
