"""Wrong input to public functions: a ValueError or TypeError that names the argument and what came. Which names have wrong calls
here is held against what the package exports."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import Net, net

import peftk
from peftk import ops, optim
from tests.reliability import wrong_rooms

Wrong = tuple[Callable[[], Any], str, str]  # the call, the argument's name, what of it the message repeats

W = torch.linspace(-1, 1, 5 * 64).view(5, 64)
W4 = peftk.quantize_nf4(W)
X = torch.ones(3, 64)
A, B = torch.ones(2, 64), torch.ones(5, 2)
CODES = torch.zeros(300, dtype=torch.uint8)
META = torch.ones(3, 64, device="meta")


def adapted() -> Net:
    return peftk.attach(net(), peftk.LoraConfig(r=2, target_modules=["q"]))


def config(kind: type, **fields: Any) -> Callable[[], Any]:
    needed = {peftk.AdaLoraConfig: {"total_step": 9}, peftk.LoraConfig: {}}.get(kind, {"num_virtual_tokens": 2})
    return lambda: kind(**{**needed, **fields})


def step_call(name: str, **changes: Any) -> Callable[[], Any]:
    """A step of the op on one parameter of four elements, with one thing wrong."""
    moments = {"adamw": 2, "ademamix": 3, "lion": 1}[name.partition("_")[0]]
    is_8 = name.endswith("8")
    names = [f"state{i + 1}" for i in range(moments)] + [f"absmax{i + 1}" for i in range(moments)]
    names = names if is_8 else ["exp_avg", "exp_avg_sq", "exp_avg_slow"][:moments]

    def made(of: str) -> torch.Tensor:
        return torch.zeros(1) if of.startswith("absmax") else torch.zeros(4, dtype=torch.uint8 if is_8 else torch.float32)

    lists = {"params": [torch.ones(4)], "grads": [torch.ones(4)], **{of: [made(of)] for of in names}}
    numbers = {"lr": 0.1, **({} if name.startswith("lion") else {"step": 1})}
    return lambda: getattr(ops, name)(**{**lists, **numbers, **changes})


def wrong_steps(name: str) -> list[Wrong]:
    first = "state1" if name.endswith("8") else "exp_avg"
    found: list[Wrong] = [
        (step_call(name, grads=[]), "grads", "0"),
        (step_call(name, grads=[torch.ones(3)]), r"grads\[0\]", r"\(3,\)"),
        (step_call(name, grads=[torch.ones(4).half()]), r"grads\[0\]", "float16"),
        (step_call(name, params=[torch.ones(4, dtype=torch.int64)]), r"params\[0\]", "int64"),
        (step_call(name, grads=[torch.ones(8)[::2]]), r"grads\[0\]", r"strides \(2,\)"),
        (step_call(name, grads=[torch.ones(4, device="meta")]), r"grads\[0\]", "meta"),
        (step_call(name, **{first: [torch.zeros(4, dtype=torch.int32)]}), rf"{first}\[0\]", "int32"),
        (step_call(name, lr=-1.0), "lr", "-1.0"),
        (step_call(name, lr=math.nan), "lr", "nan"),
        (step_call(name, lr="0.1"), "lr", "'0.1'"),
        (step_call(name, beta1=1.0), "beta1", "1.0"),
        (step_call(name, weight_decay=math.inf), "weight_decay", "inf"),
        (step_call(name, grad_factor=math.nan), "grad_factor", "nan"),
    ]
    if not name.startswith("lion"):
        found += [
            (step_call(name, step=0), "step", "0"),
            (step_call(name, step=1.5), "step", "1.5"),
            (step_call(name, step=10**30), "step", "1000000"),
            (step_call(name, eps=-1.0), "eps", "-1.0"),
        ]
    return found


def wrong_products(call: Callable, *more: Any) -> list[Wrong]:
    return [
        (lambda: call(torch.ones(3, 63), W4, *more), "x", r"\(3, 63\)"),
        (lambda: call(torch.ones(()), W4, *more), "x", r"\(\)"),
        (lambda: call(torch.ones(3, 64, dtype=torch.int64), W4, *more), "x", "int64"),
        (lambda: call(META, W4, *more), "x", "meta"),
        (lambda: call(X, W4, *more, bias=torch.ones(4)), "bias", r"\(4,\)"),
        (lambda: call(X, peftk.quantize_nf4(torch.ones(64)), *more), "w4", r"\(64,?\)"),
    ]


OPS: dict[str, list[Wrong]] = {
    "nf4_lora_linear_rows": [
        (lambda: ops.nf4_lora_linear_rows(X, W4, [A], [B], [1.0], [0, 0]), "index", "got 2"),
        (lambda: ops.nf4_lora_linear_rows(X, W4, [A], [B], [1.0], [0, 1, 0]), "index", "1"),
        (lambda: ops.nf4_lora_linear_rows(X, W4, [A], [], [1.0], [0, 0, 0]), "B", "0"),
        (lambda: ops.nf4_lora_linear_rows(X, W4, [A.T], [B], [1.0], [0, 0, 0]), "A", r"\(64, 2\)"),
    ],
    "quantize_nf4": [
        (lambda: ops.quantize_nf4(torch.ones(4, dtype=torch.int64)), "w", "int64"),
        (lambda: ops.quantize_nf4(W, block_size=63), "block_size", "63"),
        (lambda: ops.quantize_nf4(W, block_size=1 << 40), "block_size", "1099511627776"),
        (lambda: ops.quantize_nf4(W, quant_type="int4"), "quant_type", "'int4'"),
        (lambda: ops.quantize_nf4(W, nonfinite="ignore"), "nonfinite", "'ignore'"),
        (lambda: ops.quantize_nf4(torch.tensor([1.0, math.nan])), "w", r"nan at index \(1,\)"),
        (lambda: ops.quantize_nf4(torch.tensor([1.0, -math.inf]), name="layer.weight"), "layer.weight", "-inf at index"),
    ],
    "nf4_quantize": [
        (lambda: ops.nf4_quantize(torch.ones(4, dtype=torch.int64)), "w", "int64"),
        (lambda: ops.nf4_quantize(W, 0), "block_size", "0"),
        (lambda: ops.nf4_quantize(W, 64, "int4"), "quant_type", "'int4'"),
    ],
    "blockwise8_quantize": [
        (lambda: ops.blockwise8_quantize(W, 0), "block_size", "0"),
        (lambda: ops.blockwise8_quantize(CODES), "x", "uint8"),
    ],
    "blockwise8_dequantize": [
        (lambda: ops.blockwise8_dequantize(W, torch.ones(2)), "codes", "float32"),
        (lambda: ops.blockwise8_dequantize(CODES, torch.ones(2).half()), "absmax", "float16"),
        (lambda: ops.blockwise8_dequantize(CODES, torch.ones(1)), "absmax", "got 1"),
        (lambda: ops.blockwise8_dequantize(CODES, torch.ones(2), 0), "blocks of 0", "0"),
    ],
    "nf4_linear": wrong_products(ops.nf4_linear),
    "nf4_linear_int8": wrong_products(ops.nf4_linear_int8),
    "nf4_lora_linear": [
        *wrong_products(ops.nf4_lora_linear, A, B, 1.0),
        (lambda: ops.nf4_lora_linear(X, W4, torch.ones(2, 63), B, 1.0), "A", r"\(2, 63\)"),
        (lambda: ops.nf4_lora_linear(X, W4, A, torch.ones(5, 3), 1.0), "B", r"\(5, 3\)"),
        (lambda: ops.nf4_lora_linear(X, W4, A.long(), B, 1.0), "A", "int64"),
        (lambda: ops.nf4_lora_linear(X, W4, A, B, 1.0, z=torch.ones(2, 64)), "z", r"\(2, 64\)"),
        (lambda: ops.nf4_lora_linear(X, W4, A, B, 1.0, dropout=1.0), "dropout", "1.0"),
        (lambda: ops.nf4_lora_linear(X, W4, A, B, 1.0, dropout=math.nan), "dropout", "nan"),
    ],
    "lora_linear": [
        (lambda: ops.lora_linear(torch.ones(3, 63), W, A, B, 1.0), "x", r"\(3, 63\)"),
        (lambda: ops.lora_linear(X, W[0], A, B, 1.0), "weight", r"\(64,\)"),
        (lambda: ops.lora_linear(X, W.long(), A, B, 1.0), "weight", "int64"),
        (lambda: ops.lora_linear(X.half(), W, A, B, 1.0), "x", "float16"),
        (lambda: ops.lora_linear(META, W, A, B, 1.0), "x", "meta"),
        (lambda: ops.lora_linear(X, W, A, B, 1.0, bias=torch.ones(4)), "bias", r"\(4,\)"),
        (lambda: ops.lora_linear(X, W, A[0], B, 1.0), "A", r"\(64,\)"),
        (lambda: ops.lora_linear(X, W, A, B, 1.0, dropout=-0.1), "dropout", "-0.1"),
    ],
    "philox_dropout": [
        (lambda: ops.philox_dropout(X, 1.0, 0), "p", "1.0"),
        (lambda: ops.philox_dropout(X, math.nan, 0), "p", "nan"),
        (lambda: ops.philox_dropout(X, 0.5, -1), "seed", "-1"),
        (lambda: ops.philox_dropout(X, 0.5, 1 << 63), "seed", "9223372036854775808"),
    ],
    **{
        name: wrong_steps(name)
        for name in ("adamw_step", "adamw_step8", "ademamix_step", "ademamix_step8", "lion_step", "lion_step8")
    },
}


def wrong_optimizers(kind: type) -> list[Wrong]:
    def made(**options: Any) -> Callable[[], Any]:
        return lambda: kind([torch.nn.Parameter(torch.ones(4))], **options)

    return [
        (made(lr=-1.0), "lr", "-1.0"),
        (made(lr=math.nan), "lr", "nan"),
        (made(lr="fast"), "lr", "'fast'|fast"),
        (made(betas=(0.9,)), "betas", r"\(0\.9,\)"),
        (made(betas=0.9), "betas", "0.9"),
        (made(weight_decay=-1.0), "weight_decay", "-1.0"),
        (made(nonfinite="ignore"), "nonfinite", "'ignore'"),
        (made(maximize="yes"), "maximize", "'yes'"),
        (lambda: kind([]), "parameter list", "empty"),
        (lambda: kind([torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))]), "params", "complex64"),
    ]


OPTIMIZERS = [name for name in optim.__all__ if name[0].isupper()]
OPTIM: dict[str, list[Wrong]] = {name: wrong_optimizers(getattr(optim, name)) for name in OPTIMIZERS}

LORA: list[Wrong] = [
    (config(peftk.LoraConfig, r=0), "r", "0"),
    (config(peftk.LoraConfig, r=True), "r", "True"),
    (config(peftk.LoraConfig, r="8"), "r", "'8'"),
    (config(peftk.LoraConfig, lora_alpha=math.nan), "lora_alpha", "nan"),
    (config(peftk.LoraConfig, lora_dropout=1.0), "lora_dropout", "1.0"),
    (config(peftk.LoraConfig, target_modules=3), "target_modules", "3"),
    (config(peftk.LoraConfig, target_modules="("), "target_modules", r"'\('"),
    (config(peftk.LoraConfig, bias="some"), "bias", "'some'"),
    (config(peftk.LoraConfig, init_lora_weights="best"), "init_lora_weights", "'best'"),
    (config(peftk.LoraConfig, rank_pattern={"q": -1}), "rank_pattern", "-1"),
    (config(peftk.LoraConfig, layers_to_transform=[-1], target_modules=["q"]), "layers_to_transform", "-1"),
    (config(peftk.LoraConfig, use_dora="yes"), "use_dora", "'yes'"),
    (config(peftk.LoraConfig, task_type=3), "task_type", "3"),
    (config(peftk.LoraConfig, inference_mode=1), "inference_mode", "1"),
]
PROMPT_KINDS = (peftk.PrefixTuningConfig, peftk.PromptTuningConfig, peftk.PTuningConfig, peftk.PTuningV2Config)
CONFIGS: dict[str, list[Wrong]] = {
    kind.__name__: [
        (config(kind, num_virtual_tokens=0), "num_virtual_tokens", "0"),
        (config(kind, num_virtual_tokens=2.5), "num_virtual_tokens", "2.5"),
        (config(kind, task_type="GUESS"), "task_type", "'GUESS'"),
        (config(kind, modules_to_save=[3]), "modules_to_save", "3"),
        (config(kind, inference_mode=None), "inference_mode", "None"),
        (config(kind, num_layers=-1), "num_layers", "-1"),
    ]
    for kind in PROMPT_KINDS
}
MODELS: dict[str, list[Wrong]] = {
    "LoraConfig": LORA,
    "AdaLoraConfig": [
        (config(peftk.AdaLoraConfig, total_step=None), "total_step", "None"),
        (config(peftk.AdaLoraConfig, target_r=13), "target_r", "13"),
        (config(peftk.AdaLoraConfig, tinit=9), "tinit", "9"),
        (config(peftk.AdaLoraConfig, beta1=1.0), "beta1", "1.0"),
        (config(peftk.AdaLoraConfig, rank_pattern=[True]), "rank_pattern", "True"),
        (config(peftk.AdaLoraConfig, orth_reg_weight=math.inf), "orth_reg_weight", "inf"),
    ],
    **CONFIGS,
    "EvaConfig": [(lambda: peftk.EvaConfig(rho=0.5), "rho", "0.5"), (lambda: peftk.EvaConfig(tau=2), "tau", "2")],
    "LoftQConfig": [
        (lambda: peftk.LoftQConfig(loftq_bits=8), "loftq_bits", "8"),
        (lambda: peftk.LoftQConfig(loftq_iter=0), "loftq_iter", "0"),
    ],
    "NF4Weight": [
        (lambda: peftk.NF4Weight.from_state_dict({}, "a."), "a.weight", r"\[\]"),
        (lambda: W4.dequantize(torch.int8), "dtype", "int8"),
        (lambda: W4.dequantize(out=torch.ones(4)), "out", r"\(4,\)"),
        (lambda: W4.to(torch.float16), "device", "float16"),
    ],
    "quantize_nf4": OPS["quantize_nf4"],
    "use": [(lambda: peftk.use("gpu").__enter__(), "name", "'gpu'")],
    "attach": [
        (lambda: peftk.attach(3, peftk.LoraConfig()), "model", "int"),
        (lambda: peftk.attach(net(), {"r": 8}), "config", "dict"),
        (lambda: peftk.attach(net(), peftk.LoraConfig(target_modules=["nothing"])), "target_modules", "nothing"),
        (lambda: peftk.attach(net(), peftk.LoraConfig(target_modules=["q"]), "a/b"), "adapter_name", "'a/b'"),
        (lambda: peftk.attach(adapted(), peftk.LoraConfig(target_modules=["q"])), "adapter_name", "'default'"),
    ],
    "detach": [(lambda: peftk.detach(net()), "model", "Net")],
    "set_adapter": [(lambda: peftk.set_adapter(adapted(), "other"), "names", "'other'")],
    "delete_adapter": [(lambda: peftk.delete_adapter(adapted(), "other"), "name", "'other'")],
    "disable_adapters": [(lambda: peftk.disable_adapters(net()).__enter__(), "model", "Net")],
    "merge": [
        (lambda: peftk.merge(net()), "model", "Net"),
        (lambda: peftk.merge(adapted(), ["other"]), "adapter_names", "'other'"),
    ],
    "unmerge": [(lambda: peftk.unmerge(net()), "model", "Net")],
    "trainable_parameters": [(lambda: peftk.trainable_parameters(3), "model", "int")],
    "save_adapter": [
        (lambda: peftk.save_adapter(net(), "x"), "model", "Net"),
        (lambda: peftk.save_adapter(adapted(), "x", "other"), "adapter_name", "'other'"),
    ],
    "load_adapter": [
        (lambda: peftk.load_adapter(net(), "nowhere"), "nowhere", "adapter_config.json"),
        (lambda: peftk.load_adapter(adapted(), "nowhere"), "adapter_name", "'default'"),
    ],
    "quantize_model": [
        (lambda: peftk.quantize_model(torch.nn.Linear(4, 4)), "model", "linear layer"),
        (lambda: peftk.quantize_model(net(), skip="head"), "skip", "'head'"),
        (lambda: peftk.quantize_model(net(), block_size=3, progress=False), "block_size", "3"),
    ],
    "adapters_per_row": [
        (lambda: peftk.adapters_per_row(net(), ["default"]).__enter__(), "model", "Net"),
        (lambda: peftk.adapters_per_row(adapted(), ["other"]).__enter__(), "names", "'other'"),
    ],
    "combine_adapters": [
        (lambda: peftk.combine_adapters(adapted(), ["other"], [1.0], "new"), "names|adapters", "'other'"),
    ],
    "compact": [(lambda: peftk.compact(net()), "model", "Net"), (lambda: peftk.compact(adapted()), "model", "default")],
    "drop_encoder": [(lambda: peftk.drop_encoder(adapted()), "adapter_name", "'default'")],
    "rank_allocator": [(lambda: peftk.rank_allocator(adapted()), "adapter_name", "'default'")],
    "update_and_allocate": [(lambda: peftk.update_and_allocate(adapted(), 1), "adapter_name", "'default'")],
    "orthogonality_loss": [(lambda: peftk.orthogonality_loss(adapted()), "model", "default")],
    "adalora_schedule": [
        (lambda: peftk.adalora_schedule(adapted(), torch.optim.SGD(adapted().parameters(), 0.1)), "adapter_name", "'default'"),
    ],
}
TABLES = {
    "ops": OPS | wrong_rooms.OPS,
    "optim": OPTIM | wrong_rooms.OPTIM,
    "peftk": MODELS | wrong_rooms.RECIPES,
    "paging": wrong_rooms.PAGING,
    "nn": wrong_rooms.NN | {"quantize_model": MODELS["quantize_model"]},
}
# Predicates, which say no; what takes no argument, or is only ever returned.
NOTHING_WRONG = {"nn": {"is_adaptable", "is_experts"}, "paging": {"Stats", "stats"}}
CALLS = [
    pytest.param(*wrong, id=f"{room}.{name}-{i}")
    for room, table in TABLES.items()
    for name, calls in table.items()
    for i, wrong in enumerate(calls)
]


@pytest.mark.parametrize(("call", "argument", "came"), CALLS)
def test_the_error_names_the_argument_and_what_came(call, argument, came, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as found:
        call()
    message = str(found.value)
    assert re.search(rf"(?:^|\W)(?:{argument})(?:\W|$)", message), message
    assert re.search(came, message), message
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize("room", TABLES)
def test_every_public_name_has_wrong_calls_or_is_listed(room):
    module = peftk if room == "peftk" else getattr(peftk, room)
    modules = {"ops", "optim", "nn", "info", "__version__"} if room == "peftk" else set()  # info takes no argument
    names = set(module.__all__) - modules
    assert set(TABLES[room]) | NOTHING_WRONG.get(room, set()) == names
    assert not set(TABLES[room]) & NOTHING_WRONG.get(room, set())
