"""peftk.optim.AdamW: torch's steps, groups, closures, gradients that are not finite, bits, what a checkpoint keeps."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

from peftk.optim import AdamW, AdamW8bit
from peftk.optim.moments import bits_of

SHAPES = [(70, 90), (33,), (64, 64), (3, 5, 7)]  # 6300 and 4096 elements may be in 8 bits


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(seed)
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for i, s in enumerate(SHAPES)})


def set_gradients(parameters, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in parameters:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients([p for group in optimizer.param_groups for p in group["params"]], step)
        optimizer.step()


def values(parameters) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters.values()]


def assert_equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(g, e), f"{i}: {(g != e).sum()} of {g.numel()} differ"


@pytest.mark.parametrize("maximize", [False, True])
def test_steps_are_torchs(maximize):
    ours, theirs = model(), model()
    options = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, maximize=maximize)
    optimizers = AdamW(ours.parameters(), **options), torch.optim.AdamW(theirs.parameters(), fused=True, **options)
    for step in range(10):
        for optimizer in optimizers:
            train(optimizer, step, step + 1)
        for a, b in zip(values(ours), values(theirs), strict=True):
            assert ((a - b).abs() <= (2 * step + 2) * 2**-23 * b.abs().clamp(min=1e-2)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_16_bit_parameters_are_fp32(dtype):
    """Against torch on fp32 copies, which are rounded after each step as the parameters are."""
    ours, theirs = model(dtype), model(dtype).float()
    optimizer, other = AdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for step in range(5):
        set_gradients(ours.parameters(), step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        other.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.data = q.data.to(dtype).float()
            assert ((p.float() - q).abs() <= torch.finfo(dtype).eps * q.abs()).all()
    assert optimizer.state[ours["p0"]]["exp_avg"].dtype == torch.float32


def test_groups_have_their_own_options():
    parameters = model()
    groups = [
        {"params": [parameters["p0"]], "lr": 0.0},
        {"params": [parameters["p2"]], "lr": 1e-3, "betas": (0.5, 0.5), "bits": 32},
    ]
    optimizer = AdamW8bit(groups, lr=1.0)
    before = values(parameters)
    train(optimizer, 0, 1)
    assert torch.equal(parameters["p0"], before[0])
    assert ((parameters["p2"] - before[2]).abs() - 1e-3 - 1e-5 * before[2].abs() < 1e-6).all()
    assert [bits_of(optimizer.state[parameters[name]]) for name in ("p0", "p2")] == [8, 32]


def test_a_group_that_is_refused_is_not_added():
    optimizer = AdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(
        TypeError, match=r"param_groups\[1\]\['params'\]\[0\]: expected a floating-point parameter, got torch.comp"
    ):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "bits: expected 32 or 8, got 4"),
        ({"lr": -1.0}, "lr: expected a finite number, 0 or more, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"beta2: expected a number in \[0, 1\), got 1.0"),
        ({"betas": (0.9,)}, r"betas: expected two numbers, got \(0.9,\)"),
        ({"amsgrad": True}, "amsgrad: expected False, got True"),
        ({"nonfinite": "ignore"}, "nonfinite: expected one of keep, skip, raise, got 'ignore'"),
        ({"budget": 1 << 20}, "budget: expected only with paged=True, got 1048576"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(3))], **options)


def test_closure_and_parameters_without_gradient():
    parameters = model()
    optimizer = AdamW(parameters.values(), lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = parameters["p1"].square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    assert list(optimizer.state) == [parameters["p1"]] and optimizer.state[parameters["p1"]]["step"] == 20


def test_one_that_joins_later_counts_its_own_steps():
    """Bias corrections are by each parameter's number of steps, as in torch."""
    ours, theirs = model(), model()
    optimizers = [(AdamW(ours.values(), lr=1e-2), ours), (torch.optim.AdamW(theirs.values(), lr=1e-2), theirs)]
    for step in range(6):
        for optimizer, parameters in optimizers:
            set_gradients(parameters.values(), step)
            if step < 3:
                parameters["p2"].grad = None
            optimizer.step()
    assert [optimizers[0][0].state[p]["step"] for p in ours.values()] == [6, 6, 3, 6]
    for a, b in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
def test_not_contiguous(bits):
    """Transposed parameters and gradients, as their contiguous copies."""
    plain, turned = nn.Parameter(torch.randn(80, 60)), nn.Parameter(torch.empty(60, 80).T)
    turned.data.copy_(plain.data)
    optimizers = [AdamW([p], lr=1e-2, bits=bits) for p in (plain, turned)]
    for _ in range(3):
        grad = torch.randn(60, 80).T
        plain.grad, turned.grad = grad.contiguous(), grad
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, turned) and turned.stride() == (1, 80)


def test_gradients_that_do_not_fit():
    """Kernels go by addresses: nothing may be read or written beyond a tensor's end."""
    sparse = nn.Embedding(10, 4, sparse=True)
    sparse(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        TypeError, match="grad: expected a dense gradient of torch.float32, got one of torch.float32, torch.sparse_coo"
    ):
        AdamW(sparse.parameters()).step()
    p = nn.Parameter(torch.ones(20))
    optimizer = AdamW([p])
    p.grad = torch.ones(20)
    optimizer.step()
    p.grad, p.data = None, torch.ones(30)
    p.grad = torch.ones(30)
    with pytest.raises(ValueError, match=r"moments of the parameter's shape \(30,\), got \(30,\) and \(20,\)"):
        optimizer.step()
    p.data = torch.ones(10)
    with pytest.raises(ValueError, match=r"of the parameter's shape \(10,\), got \(30,\) and \(20,\)"):
        optimizer.step()


def test_autograd_is_told():
    """A parameter that a graph still needs was changed: backward says so, as after torch's own step."""
    p = nn.Parameter(torch.ones(5))
    loss = (p * p).sum()
    p.grad = torch.ones(5)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skipping(bad, caplog):
    parameters = model()
    optimizer = AdamW8bit(parameters.named_parameters(), nonfinite="skip")
    train(optimizer, 0, 2)
    before, state = values(parameters), copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(parameters.values(), 2)
    parameters["p2"].grad[3, 4] = bad
    with caplog.at_level(logging.WARNING, logger="peftk"):
        optimizer.step()
    assert "the gradient of p2 has elements that are not finite: this step changes nothing (1 skipped so far)" in caplog.text
    assert optimizer.skipped_steps == 1
    assert_equal(values(parameters), before)
    for index, tensors in optimizer.state_dict()["state"].items():
        assert tensors["step"] == 2
        assert_equal(*([v for v in s.values() if isinstance(v, torch.Tensor)] for s in (tensors, state[index])))


def test_large_gradients_are_finite():
    """Their sum isn't."""
    p = nn.Parameter(torch.ones(8, dtype=torch.float16))
    q = nn.Parameter(torch.ones(4))
    p.grad, q.grad = torch.full((8,), 6e4, dtype=torch.float16), torch.full((4,), 3e38)
    optimizer = AdamW([p, q], nonfinite="raise")
    optimizer.step()
    assert optimizer.state[q]["step"] == 1


def test_raising_and_keeping():
    parameters = model()
    set_gradients(parameters.values(), 0)
    parameters["p1"].grad[7] = float("nan")
    before = values(parameters)
    with pytest.raises(
        FloatingPointError, match=r"the gradient of param_groups\[0\]\['params'\]\[1\] has elements that are not fi"
    ):
        AdamW(parameters.values(), nonfinite="raise").step()
    assert_equal(values(parameters), before)
    AdamW(parameters.values()).step()
    assert parameters["p1"].isnan().nonzero().tolist() == [[7]]


def test_small_tensors_and_overrides():
    parameters = model()
    optimizer = AdamW8bit(parameters.named_parameters())
    optimizer.override("p2", bits=32)
    train(optimizer, 0, 2)
    assert [bits_of(optimizer.state[p]) for p in parameters.values()] == [8, 32, 32, 32]
    optimizer.override(parameters["p0"], bits=32)  # what is there is converted
    optimizer.override("p1", bits=8)
    assert [bits_of(optimizer.state[p]) for p in parameters.values()] == [32, 8, 32, 32]
    train(optimizer, 2, 3)
    copied = model()
    again = AdamW8bit(copied.named_parameters())
    again.load_state_dict(optimizer.state_dict())
    assert [bits_of(again.state[p]) for p in copied.values()] == [32, 8, 32, 32]
    with pytest.raises(
        KeyError, match="param: expected a parameter of this optimizer, or its name if it was given names, got p9"
    ):
        optimizer.override("p9", bits=32)
    with pytest.raises(ValueError, match="bits: expected 32 or 8, got 16"):
        optimizer.override("p0", bits=16)


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", ["file", "deepcopy", "pickle"])
def test_going_on_is_bit_for_bit(kind, dtype, by):
    """Six steps at once, and three, saved, loaded, three more; the moments of bf16 parameters stay fp32."""
    whole, parts = model(dtype), model(dtype)
    train(kind(whole.named_parameters(), lr=1e-2), 0, 6)
    first = kind(parts.named_parameters(), lr=1e-2)
    train(first, 0, 3)
    if by == "file":
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = kind(parts.named_parameters(), lr=0.5)
        second.load_state_dict(torch.load(file))
    else:
        parts, second = copy.deepcopy((parts, first)) if by == "deepcopy" else pickle.loads(pickle.dumps((parts, first)))
    train(second, 3, 6)
    assert_equal(values(parts), values(whole))


def test_a_loaded_state_comes_to_this_optimizers_bits():
    """And so do parameters that take their first step afterwards; other options are the loaded ones."""
    parameters = model()
    first, second = AdamW(parameters.values(), lr=0.25), AdamW8bit(parameters.values())
    set_gradients([parameters["p0"]], 0)
    first.step()
    second.load_state_dict(first.state_dict())
    train(second, 1, 2)
    assert [bits_of(second.state[parameters[name]]) for name in ("p0", "p2")] == [8, 8]
    assert second.param_groups[0]["lr"] == 0.25 and second.state[parameters["p0"]]["step"] == 2


def test_state_of_another_shape_is_refused():
    optimizer = AdamW(model().named_parameters())
    train(optimizer, 0, 1)
    state = optimizer.state_dict()
    state["state"][2]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"p2.exp_avg: expected shape \(64, 64\), got \(5,\)"):
        AdamW(model().named_parameters()).load_state_dict(state)


def test_distributed_checkpoint(tmp_path):
    """torch.distributed.checkpoint by parameter names, in one process."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    first, second = model(), model()
    optimizer, other = AdamW8bit(first.parameters(), lr=1e-2), AdamW8bit(second.parameters(), lr=1e-2)
    train(optimizer, 0, 3)
    checkpoint.save({"optimizer": get_optimizer_state_dict(first, optimizer)}, checkpoint_id=tmp_path)
    with torch.no_grad():
        for p, q in zip(second.parameters(), first.parameters(), strict=True):
            p.copy_(q)
    loaded = {"optimizer": get_optimizer_state_dict(second, other)}
    checkpoint.load(loaded, checkpoint_id=tmp_path)
    set_optimizer_state_dict(second, other, loaded["optimizer"])
    for one in (optimizer, other):
        train(one, 3, 5)
    assert_equal(values(second), values(first))


def test_grad_scaler():
    """Gradients of a scaled loss are unscaled before the step; one with Inf in it is left out."""
    scaled, plain = nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(10))
    optimizer, other = AdamW([scaled], lr=0.1), AdamW([plain], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, float("inf"), 2.0):
        optimizer.zero_grad(), other.zero_grad()
        scaler.scale((scaled * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor < 100:
            (plain * factor).sum().backward()
            other.step()
    assert torch.equal(scaled, plain) and optimizer.state[scaled]["step"] == 2
