"""DDP, fully_shard, tensor parallelism and distributed checkpoints in 2 and 4 processes: the same losses as in one, and the parts
that a process should hold."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

import peftk
from distributed.models import adalora, adamw, batch, decoder, train
from distributed.processes import run

CLOSE = {"rtol": 2e-5, "atol": 0}


def alone(config=None, kind=torch.optim.AdamW, steps: int = 2, **facts) -> list[float]:
    """The losses of one process."""
    model = decoder(config, **facts)
    optimizer = adamw(model, kind)
    if config is not None:
        peftk.adalora_schedule(model, optimizer, compact=False)
    return train(model, batch(), optimizer, steps).tolist()


def assert_close(losses: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), **CLOSE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def four(folder):
    return run(4, "sharded", ("saved", {"folder": folder}))


@pytest.fixture(scope="module")
def two(folder, four):
    others = ("replicated", "mixed_precision", "offloaded", "own_optimizers", "allocated")
    return run(2, *others, ("tensor_parallel", {"block_size": 32}), ("loaded", {"folder": folder}))


def test_replicated(two):
    for losses in two["replicated"]:
        assert_close(losses, alone())


def test_sharded_computes_the_same(four):
    for result in four["sharded"]:
        assert_close(result["losses"], alone())


def test_sharded_bytes_are_exact(four):
    assert all(result["gathered"] and result["copied"] for result in four["sharded"])


def test_sharded_memory_falls_with_the_processes(four):
    """All but the constants' own constants: here a scale and an offset for each of 6 layers."""
    for result in four["sharded"]:
        assert result["own"]["buffers"] == 6 * 4 * 2
        assert result["own"]["parameters"] == (sum(result["whole"].values()) - 6 * 4 * 2) / 4


def test_what_needs_whole_weights_says_what_to_do(four):
    before, split = "change weights before they are split", "expected whole parameters, got {}, split among 4 processes"
    expected = {
        "merge": f"model: {split}; save the adapter .* and merge there",
        "attach": f"model: {split}; attach before it is split",
        "quantize_model": f"model: {split}; quantise before it is split",
        "from_linear": f"linear: {split}; {before}",
        "set_dense_weight": f"layer: {split}; {before}",
        "restore_weight": f"layer: {split}; {before}",
        "dense": "layer: expected a whole weight, got one that is split among processes; change weights before that",
        "whole file": f"layer: {split}; load whole weights before it is split, or what .* saved of split ones",
    }
    for result in four["sharded"]:
        assert result["refused"].keys() == expected.keys()
        for name, message in expected.items():
            assert re.search(message.format(r"\S*weight"), result["refused"][name]), result["refused"][name]


def test_mixed_precision_leaves_stored_bytes_alone(two):
    expected = alone(dtype=torch.bfloat16)
    for result in two["mixed_precision"]:
        assert result["bytes"] and result["stored"]
        assert result["factor"] == torch.bfloat16  # the policy is at work
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected), rtol=2e-2, atol=0)


def test_offloaded(two):
    for losses in two["offloaded"]:
        assert_close(losses, alone())


def test_own_optimizers_on_parts(two):
    expected, in_8_bits = alone(kind=peftk.optim.AdamW), alone()
    for result in two["own_optimizers"]:
        assert_close(result["32 bits"], expected)
        assert result["paged"] == result["32 bits"]
        torch.testing.assert_close(torch.tensor(result["8 bits"]), torch.tensor(in_8_bits), rtol=1e-3, atol=0)
        assert result["skipped"] == (1, True)  # also in the processes whose parts are finite


def assert_allocated(results: list[dict], expected_losses: list[float], history: list) -> None:
    for result in results:
        assert_close(result["losses"], expected_losses)
        assert result["history"] == history
        for path, score in results[0]["scores"].items():
            assert torch.equal(result["scores"][path], score), path
        for path, rank in history[-1][1].items():
            assert int((result["values"][path] != 0).sum()) == rank


def history_alone() -> list:
    model = decoder(adalora())
    optimizer = adamw(model)
    schedule = peftk.adalora_schedule(model, optimizer, compact=False)
    train(model, batch(), optimizer, 4)
    return schedule.history


def test_adalora_agrees_in_every_process(two):
    assert_allocated(two["allocated"], alone(adalora(), steps=4), history_alone())


def test_checkpoint_of_four_goes_on_in_two(four, two, folder):
    expected = alone(adalora(), steps=4)[2:]
    for losses in (*four["saved"], *two["loaded"]):
        assert_close(losses, expected)


def test_adapter_is_gathered_for_its_file(four, folder):
    model = decoder(adalora())
    optimizer = adamw(model)
    peftk.adalora_schedule(model, optimizer, compact=False)
    train(model, batch(), optimizer, 2)
    expected = peftk.checkpoint.adapter_tensors(model, "default")
    found = load_file(f"{folder}/adapter/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key].detach(), rtol=1e-3, atol=1e-5)


def assert_tensor_parallel(results: list[dict], **facts) -> None:
    model = decoder(bias=True, **facts)
    losses = train(model, batch(), adamw(model), 2).tolist()
    names = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for result in results:
        assert_close(result["losses"], losses)
        assert result["weights"], "the parts put together are the weight"
        assert result["factors"].keys() == names.keys()
        for name, factor in result["factors"].items():
            torch.testing.assert_close(factor, names[name], rtol=1e-2, atol=2e-5, msg=name)
            assert torch.equal(factor, results[0]["factors"][name]), f"{name} differs among processes"


def test_tensor_parallel(two):
    """Blocks of 32 elements, so that half of 64 columns is whole blocks."""
    assert_tensor_parallel(two["tensor_parallel"], block_size=32)


@pytest.mark.full
@pytest.mark.parametrize(
    ("facts", "most"), [({"base": "dense"}, 0.33), ({"block_size": 32, "width": 128}, 0.45)], ids=["dense", "nf4"]
)
def test_tensor_parallel_in_four_processes(facts, most):
    """A quarter of 128 columns is one block; beside weights in 4 bits the factors that stay whole count for more."""
    results = run(4, ("tensor_parallel", facts))["tensor_parallel"]
    assert_tensor_parallel(results, **facts)
    for result in results:  # biases of o and down, norms and the factors that stay whole aside
        assert sum(result["own"].values()) < most * sum(result["whole"].values())


@pytest.mark.full
def test_tensor_parallel_adalora():
    model = decoder(adalora(), bias=True, block_size=32)
    optimizer = adamw(model)
    schedule = peftk.adalora_schedule(model, optimizer, compact=False)
    expected = train(model, batch(), optimizer, 4).tolist()
    for result in run(2, ("tensor_parallel", {"config": "adalora", "block_size": 32}))["tensor_parallel"]:
        assert_close(result["losses"], expected)
        assert result["history"] == schedule.history


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4])
def test_two_and_four_processes_are_one(ranks: int):
    """Every engine but tensor parallelism, in the number of processes that the tests above leave out as well."""
    results = run(ranks, "replicated", "sharded", "mixed_precision", "offloaded", "allocated")
    for rank in range(ranks):
        assert_close(results["replicated"][rank], alone())
        assert_close(results["offloaded"][rank], alone())
        sharded = results["sharded"][rank]
        assert sharded["gathered"] and sharded["copied"]
        assert_close(sharded["losses"], alone())
        assert sharded["own"]["parameters"] == (sum(sharded["whole"].values()) - sharded["own"]["buffers"]) / ranks
        assert results["mixed_precision"][rank]["bytes"] and results["mixed_precision"][rank]["stored"]
    assert_allocated(results["allocated"], alone(adalora(), steps=4), history_alone())


@pytest.mark.full
def test_more_of_the_same(tmp_path):
    """Constants in fp32, DDP with AdaLoRA, and 8-bit moments through a checkpoint."""
    folder = str(tmp_path / "checkpoint")
    four = run(
        4,
        ("sharded", {"double_quant": False}),
        ("allocated", {"kind": "replicated"}),
        ("saved", {"folder": folder, "kind": "AdamW8bit"}),
    )
    for result in four["sharded"]:
        assert result["gathered"] and result["copied"]
        assert_close(result["losses"], alone(double_quant=False))
        assert result["own"] == {"parameters": sum(result["whole"].values()) / 4, "buffers": 0}
    assert_allocated(four["allocated"], alone(adalora(), steps=4), history_alone())
    for losses in run(2, ("loaded", {"folder": folder, "kind": "AdamW8bit"}))["loaded"]:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(four["saved"][0]), rtol=1e-3, atol=0)
