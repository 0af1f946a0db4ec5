"""Plans: depth, methods, devices."""

from __future__ import annotations

import pytest
import torch

import peftk
from peftk.cli.loss import LanguageModelLoss
from peftk.planner import Machine, Step, plan
from peftk.planner.geometries import is_uniform
from peftk.planner.planning import BUCKETS, GATHERED, WINDOW, units_of
from peftk.planner.step import ADAPTERS, CONSTANTS, GRADIENTS, LOGITS, OPTIMIZER, WEIGHTS, WEIGHTS4, run

SHORT = Step(batch=2, length=32)


@pytest.mark.parametrize(
    ("method", "base", "checkpointing"),
    [("lora", "nf4", True), ("adalora", "dense", False), ("prefix", "nf4", True), ("full", "dense", True)],
)
def test_a_uniform_models_layers_add_up(blueprint, monkeypatch, method: str, base: str, checkpointing: bool):
    deep = blueprint(method, base, layers=7)
    asked = Step(batch=2, length=32, checkpointing=checkpointing)
    assert is_uniform(deep.config)
    quick = plan(deep, LanguageModelLoss, asked)
    monkeypatch.setattr("peftk.planner.planning.is_uniform", lambda config: False)
    assert quick == plan(deep, LanguageModelLoss, asked)


def test_weights_are_the_reports(blueprint):
    made = blueprint()
    report = peftk.report(made.build())
    parts = plan(made, LanguageModelLoss, SHORT).parts
    assert parts[WEIGHTS4] + parts[CONSTANTS] == report.quantized.bytes
    assert parts[ADAPTERS] == report.trainable.bytes
    assert parts[WEIGHTS] == pytest.approx(sum(size.bytes for size in report.dense.values()), abs=1000)  # rotary frequencies
    assert parts[OPTIMIZER] == 2 * parts[ADAPTERS]


def test_checkpointing_and_bits_take_less(blueprint):
    def total(**changes) -> int:
        return plan(blueprint(layers=6, hidden_size=1024), LanguageModelLoss, Step(batch=4, length=64, **changes)).total

    plain = total()
    assert total(checkpointing=True) < plain - 3_000_000
    assert total(optimizer_bits=8) < plain - 100_000


def test_gradients_wait_while_they_are_accumulated(blueprint):
    once, twice = (plan(blueprint(), LanguageModelLoss, Step(2, 32, grad_accum=n)).phases["forward"] for n in (1, 2))
    assert twice - once == pytest.approx(peftk.report(blueprint().build()).trainable.bytes, rel=0.1)


def test_a_trained_head_gets_whole_logits(blueprint):
    step = Step(batch=4, length=100)
    assert plan(blueprint("full", "dense"), LanguageModelLoss, step).parts[LOGITS] >= 4 * 100 * 320 * 4
    assert plan(blueprint(), LanguageModelLoss, step).phases["loss"] > 0


def test_a_cpu_and_a_gpu_run_a_dense_base_in_different_ways(blueprint):
    made = blueprint("lora", "dense")
    cpu, gpu = (run(made.build(), LanguageModelLoss, Step(2, 32, device_type=kind)) for kind in ("cpu", "cuda"))
    assert {m.phase: m.total for m in cpu}["forward"] < {m.phase: m.total for m in gpu}["forward"]


def test_paged_states_leave_a_window(blueprint):
    whole = plan(blueprint(), LanguageModelLoss, SHORT)
    paged = plan(blueprint(), LanguageModelLoss, SHORT, Machine(paged=True, budget=50_000))
    assert paged.parts[WINDOW] == 50_000 and OPTIMIZER not in paged.parts
    assert paged.paged_out == whole.parts[OPTIMIZER] - 50_000
    assert paged.total == whole.total - paged.paged_out
    roomy = plan(blueprint(), LanguageModelLoss, SHORT, Machine(paged=True))
    assert roomy.paged_out == 0 and roomy.total == whole.total


def test_several_gpus(blueprint):
    made = blueprint("lora", "dense", layers=4)
    step = Step(batch=2, length=32)
    one = plan(made, LanguageModelLoss, step).parts
    ddp = plan(made, LanguageModelLoss, step, Machine(gpus=4)).parts
    assert ddp == one | ({BUCKETS: one[GRADIENTS]} if GRADIENTS in one else {})
    fsdp = plan(made, LanguageModelLoss, step, Machine(gpus=4, sharding="fsdp")).parts
    units, model = units_of(made.build()), made.build()
    assert fsdp[ADAPTERS] == one[ADAPTERS] // 4 and fsdp[OPTIMIZER] == one[OPTIMIZER] // 4
    assert fsdp[WEIGHTS] == (one[WEIGHTS] - (whole := sum(b.nbytes for b in model.buffers()))) // 4 + whole
    assert fsdp[GATHERED] == units.root + 2 * units.layer
    assert units.root + 4 * units.layer == sum(p.nbytes for p in model.parameters())


def test_fully_sharded_constants(blueprint):
    """Parameters, as fully_shard needs them: whole on every GPU are the constants' own, a scale a 256 and an offset a layer."""
    one, fsdp = (
        plan(blueprint(), LanguageModelLoss, SHORT, machine).parts for machine in (Machine(), Machine(gpus=4, sharding="fsdp"))
    )
    layers = [m for m in blueprint().build().modules() if isinstance(m, peftk.nn.NF4Linear)]
    own = sum(layer.absmax_scale.nbytes + layer.absmax_offset.nbytes for layer in layers)
    assert fsdp[CONSTANTS] == (one[CONSTANTS] - own) // 4 + own
    assert fsdp[WEIGHTS4] == one[WEIGHTS4] // 4


def test_a_rank_of_4_rows_for_8_processes(blueprint):
    """A of 4 rows lies in 4 of 8 processes, the first among them; whoever has no row still sends and gets one."""
    made = blueprint(layers=2)
    model = made.build()
    fsdp = plan(made, LanguageModelLoss, SHORT, Machine(gpus=8, sharding="fsdp"))
    factors = [p for p in model.parameters() if p.requires_grad]
    assert fsdp.parts[ADAPTERS] == sum(p.nbytes // min(8, len(p)) for p in factors)
    assert fsdp.collectives["reduce-scatter"] == sum(4 * p.numel() * max(1, 8 // len(p)) for p in factors)


def test_tensor_parallelism_is_a_narrower_model(blueprint):
    made = blueprint(layers=6, num_key_value_heads=4, intermediate_size=256)
    one = plan(made, LanguageModelLoss, SHORT).parts
    two = plan(made, LanguageModelLoss, SHORT, Machine(gpus=2, sharding="tp")).parts
    assert two[WEIGHTS4] == one[WEIGHTS4] // 2 and two[WEIGHTS] == one[WEIGHTS]
    assert one[CONSTANTS] / 2 < two[CONSTANTS] < one[CONSTANTS] * 2  # of some layers in fp32
    assert one[ADAPTERS] / 2 < two[ADAPTERS] < one[ADAPTERS]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"gpus": 0}, "gpus: expected 1 or more, got 0"),
        ({"sharding": "zero"}, "sharding: expected one of ddp, fsdp, tp, got 'zero'"),
        ({"budget": 5}, "budget: expected only with paged states, got 5"),
    ],
)
def test_machines_that_are_none(facts: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Machine(**facts)


def test_nothing_is_left_behind(blueprint):
    model = blueprint().build()
    run(model, LanguageModelLoss, Step(2, 32, checkpointing=True))
    assert all(p.grad is None for p in model.parameters()) and not model.is_gradient_checkpointing
    assert torch.empty(1, device="meta").is_meta
