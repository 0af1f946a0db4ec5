"""What each process does; processes.py runs these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import peftk
from distributed.models import ROWS, adalora, adamw, batch, decoder, train
from peftk.integrations.tensor_parallel import ColwiseParallel, RowwiseParallel
from peftk.nn import NF4Linear
from peftk.shards import part, whole


def own_rows() -> torch.Tensor:
    """This process's part of the batch."""
    return batch().view(distributed.get_world_size(), -1, batch().shape[1])[distributed.get_rank()]


def mean(losses: torch.Tensor) -> list[float]:
    """Over the processes, whose batches are of one size."""
    distributed.all_reduce(losses)
    return (losses / distributed.get_world_size()).tolist()


def shard(model: nn.Module, **policy: Any) -> nn.Module:
    """Every block and the rest, as torch's documents have it."""
    peftk.nn.constants_as_parameters(model)
    for block in model.blocks:
        fully_shard(block, **policy)
    return fully_shard(model, **policy)


def own_bytes(model: nn.Module) -> dict[str, int]:
    """What this process holds: of Parameters, and of buffers."""
    sizes = {"parameters": model.parameters(), "buffers": model.buffers()}
    return {kind: sum(part(t).numel() * t.element_size() for t in tensors) for kind, tensors in sizes.items()}


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Codes and constants of every 4-bit layer."""
    layers = {path: module.w4 for path, module in model.named_modules() if isinstance(module, NF4Linear)}
    return {f"{path}.{i}": t.clone() for path, w4 in layers.items() for i, t in enumerate(w4.tensors()) if t is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    flat = [(one[key].reshape(-1), other[key].reshape(-1)) for key in one]
    return one.keys() == other.keys() and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in flat)


def replicated() -> list[float]:
    """DDP; buffers are the same everywhere and needn't be sent in every step."""
    model = decoder()
    return mean(train(nn.parallel.DistributedDataParallel(model, broadcast_buffers=False), own_rows(), adamw(model)))


def sharded(double_quant: bool = True) -> dict[str, Any]:
    """fully_shard, and what becomes of the bytes on the way."""
    model = decoder(double_quant=double_quant)
    before, bytes_whole = stored(model), own_bytes(model)
    shard(model)
    result = {"whole": bytes_whole, "own": own_bytes(model), "gathered": same(before, stored(model))}
    with torch.no_grad():  # copies as optimizers and checkpoints make them: one by one, and many at once
        shards = [part(p) for p in model.parameters() if p.dtype == torch.uint8]
        originals, copies = [t.clone() for t in shards], [torch.empty_like(t) for t in shards]
        torch._foreach_copy_(copies, shards)
        for own in shards:
            own.zero_()
        torch._foreach_copy_(shards, copies)
    result["copied"] = all(map(torch.equal, originals, shards)) and same(before, stored(model))
    return result | {"losses": mean(train(model, own_rows(), adamw(model))), "refused": refusals(model)}


def refusals(model: nn.Module) -> dict[str, str]:
    """What a split model says to what changes whole weights; nothing is changed."""
    layer, dense = model.blocks[0].up.base_layer, peftk.nn.DenseLinear.from_linear(model.head)
    w = torch.zeros(layer.out_features, layer.in_features)
    plain = decoder().blocks[0].up.base_layer.state_dict()
    asked = {
        "merge": lambda: peftk.merge(model),
        "attach": lambda: peftk.attach(model, peftk.LoraConfig(target_modules="all-linear"), "other"),
        "quantize_model": lambda: peftk.quantize_model(model, (), progress=False),
        "from_linear": lambda: NF4Linear.from_linear(model.head),
        "set_dense_weight": lambda: layer.set_dense_weight(w),
        "restore_weight": lambda: layer.restore_weight(layer.weight_snapshot()),
        "dense": lambda: dense.set_dense_weight(torch.zeros(dense.weight.shape)),
        "whole file": lambda: layer.load_state_dict(plain),
    }
    before, said = own_bytes(model), {}
    for name, ask in asked.items():
        try:
            ask()
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)
    assert own_bytes(model) == before
    return said


def mixed_precision() -> dict[str, Any]:
    """param_dtype=bf16 with gradient checkpointing; what a 4-bit layer holds while it computes."""
    model = decoder(dtype=torch.bfloat16)
    model.checkpointing = True
    before = stored(model)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    seen: dict[str, torch.Tensor] = {}

    def look(block: nn.Module, _: Any) -> None:
        weight = block.up.base_layer.w4
        seen.update({f"up.{i}": t.clone() for i, t in enumerate(weight.tensors())}, factor=block.up.lora_A["default"].detach())

    model.blocks[0].norm2.register_forward_pre_hook(lambda _, inputs: look(model.blocks[0], inputs))
    losses = mean(train(model, own_rows(), adamw(model)))
    factor = seen.pop("factor")
    kept = {key.removeprefix("blocks.0.").replace("up.base_layer", "up"): t for key, t in before.items() if "blocks.0.up" in key}
    return {"losses": losses, "bytes": same(kept, seen), "factor": factor.dtype, "stored": same(before, stored(model))}


def offloaded() -> list[float]:
    model = shard(decoder(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    return mean(train(model, own_rows(), adamw(model)))


def own_optimizers() -> dict[str, Any]:
    """peftk's AdamW on parameters of which each process holds a part."""
    kinds = {
        "32 bits": (peftk.optim.AdamW, {}),
        "8 bits": (peftk.optim.AdamW8bit, {"min_8bit_size": 1}),
        "paged": (peftk.optim.PagedAdamW, {}),
    }
    results: dict[str, Any] = {}
    for name, (kind, options) in kinds.items():
        model = shard(decoder())
        results[name] = mean(train(model, own_rows(), adamw(model, kind, **options)))
    model = shard(decoder())
    optimizer = adamw(model, peftk.optim.AdamW, nonfinite="skip")
    model(own_rows()).backward()
    last = peftk.trainable_parameters(model)[-1]
    if distributed.get_rank() == 0:
        part(last.grad).view(-1)[0] = float("nan")
    before = [part(p).clone() for p in peftk.trainable_parameters(model)]
    optimizer.step()
    unchanged = all(torch.equal(a, part(b)) for a, b in zip(before, peftk.trainable_parameters(model), strict=True))
    return results | {"skipped": (optimizer.skipped_steps, unchanged)}


def allocated(kind: str = "sharded") -> dict[str, Any]:
    """AdaLoRA: scores after the first step, then the ranks' history and the losses."""
    model = decoder(adalora())
    run = shard(model) if kind == "sharded" else nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = adamw(model)
    schedule = peftk.adalora_schedule(model, optimizer)
    first = train(run, own_rows(), optimizer, 1)
    scores = schedule.allocator.scores()
    losses = mean(torch.cat([first, train(run, own_rows(), optimizer, 3)]))
    values = {path: whole(layer.lora_E["default"].detach()) for path, layer in model.named_modules() if hasattr(layer, "lora_E")}
    return {"scores": scores, "history": schedule.history, "losses": losses, "values": values}


def tensor_parallel(config: str = "lora", base: str = "nf4", **facts: Any) -> dict[str, Any]:
    """Attention by heads, the wide layer by its width; biases that aren't zero."""
    model = decoder(adalora() if config == "adalora" else None, base, bias=True, **facts)
    paths = {path: module.base_layer for path, module in model.named_modules() if hasattr(module, "base_layer")}
    before, bytes_whole = {path: layer.dense_weight().clone() for path, layer in paths.items()}, own_bytes(model.blocks)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tp",))
    plan = {f"blocks.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")}
    parallelize_module(model, mesh, plan | {f"blocks.*.{name}": RowwiseParallel() for name in ("o", "down")})
    same_weights = all(torch.equal(whole(layer.dense_weight()), before[path]) for path, layer in paths.items())
    optimizer = adamw(model)
    schedule = peftk.adalora_schedule(model, optimizer) if config == "adalora" else None
    losses = train(model, batch(), optimizer, 4 if schedule else 2).tolist()
    factors = {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    return {
        "losses": losses,
        "weights": same_weights,
        "whole": bytes_whole,
        "own": own_bytes(model.blocks),
        "factors": factors,
        "history": schedule and schedule.history,
    }


def saved(folder: str, kind: str = "AdamW") -> list[float]:
    """Trains, saves model, optimizer and AdaLoRA's schedule, and returns the losses of the steps after that."""
    model, optimizer, schedule = _resumable(kind)
    train(model, own_rows(), optimizer, 2)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state, "schedule": schedule.state_dict()}, checkpoint_id=folder)
    peftk.save_adapter(model, Path(folder) / "adapter")
    return mean(train(model, own_rows(), optimizer, 2))


def loaded(folder: str, kind: str = "AdamW") -> list[float]:
    """Goes on from there, in another number of processes; what is there before is overwritten first."""
    model, optimizer, schedule = _resumable(kind)
    train(model, own_rows(), optimizer, 1)  # makes the states that the checkpoint fills
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            part(tensor).fill_(3)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "schedule": schedule.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return mean(train(model, own_rows(), optimizer, 2))


def counted(size: int, cases: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    """By (engine, whether activations are checkpointed): what this process holds and what its collectives are about, as the bench
    counts it."""
    from bench import distributed_step as bench

    return [bench.train("peftk", engine, bench.config_of(size), checkpointing=again) for engine, again in cases]


def _resumable(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = shard(decoder(adalora()))
    optimizer = adamw(model, torch.optim.AdamW if kind == "AdamW" else getattr(peftk.optim, kind))
    return model, optimizer, peftk.adalora_schedule(model, optimizer)


assert ROWS % 4 == 0
