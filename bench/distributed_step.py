"""What one of several processes does for bench/layers/bench_distributed.py: builds a small LLaMA in 4 bits with LoRA, hands it to
one of torch's engines, and trains a few steps over gloo; what it holds, its peak, and every collective are told as JSON.

Freed memory is given back at once, as in bench/memory_plan.py, so that the peak is what a step holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from bench import peers
from bench.collectives import Collectives
from bench.memory_plan import GIVE_BACK
from peftk.planner import Blueprint, Machine, Plan, Step, plan
from peftk.planner.step import ADAPTERS, CONSTANTS, OPTIMIZER, WEIGHTS, WEIGHTS4

OURS, ON_BITSANDBYTES = "peftk", "HF peft on bitsandbytes"
ENGINES = {"ddp": "DDP", "fsdp": "fully_shard", "tp": "tensor parallel"}
LAYERS, TOKENS, RANK, HEAD = 8, 256, 16, 64
STEPS, COUNTED = 3, 1  # collectives are counted in the second step: in the first DDP has words of its own
TIMEOUT = datetime.timedelta(seconds=300)


def config_of(size: int) -> Any:
    """LLaMA's, a quarter of ``size`` wide."""
    import transformers

    width = size // 4
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // HEAD, "vocab_size": 8 * width}
    return transformers.LlamaConfig(**sizes, num_key_value_heads=width // HEAD, num_hidden_layers=LAYERS)


def prepared(model: nn.Module) -> None:
    """As ``peftk finetune`` does it."""
    import peftk
    from peftk.cli.prepare import prepare_base

    prepare_base(model, "nf4", torch.bfloat16, next(model.parameters()).device)
    peftk.attach(model, peftk.LoraConfig(r=RANK, target_modules="all-linear"))


def planned(engine: str, ranks: int, size: int, checkpointing: bool = False) -> Plan:
    """By the planner."""
    from peftk.cli.loss import LanguageModelLoss

    step = Step(1, TOKENS, checkpointing, device_type="cpu")
    return plan(Blueprint(config_of(size), torch.bfloat16, prepared), LanguageModelLoss, step, Machine(ranks, engine))


# ---- one process ------------------------------------------------------------------------------------------------------------


def run(who: str, engine: str, rank: int, ranks: int, store: str, size: int) -> dict[str, Any]:
    """``train`` over gloo, and the ``peak`` of resident memory above that after import, bytes."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, GIVE_BACK), libc.mallopt(-1, GIVE_BACK)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=TIMEOUT)
    import transformers

    if who == ON_BITSANDBYTES:
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
    config = config_of(size)
    transformers.AutoModelForCausalLM._model_mapping[type(config)]  # imports the code of the model
    after_import = _status("VmRSS")

    def forget_the_past() -> None:
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    told = train(who, engine, config, forget_the_past)
    return told | {"peak": _status("VmHWM") - after_import}


def train(
    who: str, engine: str, config: Any, before_steps: Callable[[], Any] = lambda: None, checkpointing: bool = False
) -> dict[str, Any]:
    """In each process of the group. Bytes ``held`` in this one between steps, by kind, and of the ``collectives`` of a step, by
    kind; and the ``losses``."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    model = build(who, config)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = split(who, model, engine, ranks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    before_steps()
    torch.manual_seed(0 if engine == "tp" else rank)
    counted, losses = Collectives(), []
    for i in range(STEPS):
        ids = torch.randint(0, config.vocab_size, (1, TOKENS))
        with counted if i == COUNTED else contextlib.nullcontext():
            losses.append(_forward_backward(step, ids))
        optimizer.step()
        optimizer.zero_grad()
    return {"held": held(model, optimizer), "collectives": dict(counted.bytes), "losses": losses}


def _forward_backward(model: nn.Module, ids: torch.Tensor) -> float:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


def build(who: str, config: Any) -> nn.Module:
    """The same weights in every process, in 4 bits, with adapters of ours or HF peft's."""
    import transformers

    import peftk

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if who == OURS:
        prepared(model)
        return model.train()
    import peft

    from peftk.cli.prepare import quantise_base

    quantise_base(model.requires_grad_(False))
    for path, module in list(model.named_modules()):
        if isinstance(module, peftk.nn.NF4Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, peers.bnb_linear(module.w4, torch.bfloat16))
    model.is_loaded_in_4bit = True
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear")).train()


def split(who: str, model: nn.Module, engine: str, ranks: int) -> nn.Module:
    """What is called in a step."""
    import peftk

    if ranks == 1:
        return model
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    if engine == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        peftk.nn.constants_as_parameters(model)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in list(model.modules()):
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel

    mesh = init_device_mesh("cpu", (ranks,))
    if who == OURS:
        from peftk.integrations.tensor_parallel import plan_of

        return parallel.parallelize_module(model, mesh, plan_of(model))
    styles = {"colwise": parallel.ColwiseParallel, "rowwise": parallel.RowwiseParallel}  # torch's own, as HF peft has none
    plan = {f"base_model.model.model.{path}": styles[style]() for path, style in model.config.base_model_tp_plan.items()}
    return parallel.parallelize_module(model, mesh, plan)


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes in this process, by the planner's kinds."""
    from peftk.nn import NF4Linear
    from peftk.shards import part

    found: Counter[str] = Counter()
    seen: set[int] = set()

    def enter(kind: str, tensor: torch.Tensor | None) -> None:
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[kind] += part(tensor).numel() * tensor.element_size()

    for module in model.modules():
        if isinstance(module, NF4Linear):
            enter(WEIGHTS4, module.weight)
            for constant in module.constants():
                enter(CONSTANTS, constant)
        elif (state := getattr(module, "quant_state", None)) is not None:
            enter(WEIGHTS4, module.weight)
            for tensor in (state.absmax, state.code, state.offset, *(vars(state.state2).values() if state.nested else ())):
                enter(CONSTANTS, tensor)
    for parameter in model.parameters():
        enter(ADAPTERS if parameter.requires_grad else WEIGHTS, parameter)
    for buffer in model.buffers():
        enter(WEIGHTS, buffer)
    for state in optimizer.state.values():
        for tensor in state.values():
            enter(OPTIMIZER, tensor if isinstance(tensor, torch.Tensor) and tensor.dim() else None)  # not the count of steps
    return dict(found)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    told = run(**json.loads(sys.argv[1]))
    distributed.barrier()
    print(json.dumps(told), flush=True)
    os._exit(0)  # about one torch process in four aborts in a destructor when all results are right
