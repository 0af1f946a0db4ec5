"""Another adapter in every row, against each row alone; the vote of several prompts."""

from __future__ import annotations

import contextlib

import prompt_models as pm
import pytest
import torch
from torch import nn

import peftk
from peftk import LoraConfig, PrefixTuningConfig, PromptTuningConfig, PTuningConfig, attach
from peftk.nn import nf4_linear

METHODS = {
    "prompt": lambda n: PromptTuningConfig(num_virtual_tokens=n),
    "prefix": lambda n: PrefixTuningConfig(num_virtual_tokens=n),
    "kinds": lambda n: PrefixTuningConfig(num_virtual_tokens=n, attentions=["encoder", "self", "cross"]),
    "p-tuning": lambda n: PTuningConfig(num_virtual_tokens=n, encoder_reparameterization_type="NONE"),
    "template": lambda n: PTuningConfig(template=f"[v]*{n} {{x}} [v]*2", encoder_reparameterization_type="NONE"),
    "lora": lambda n: LoraConfig(r=n, target_modules="all-linear"),
}
CASES = [
    ("gpt2", "prompt"), ("gpt2", "prefix"), ("gpt2", "template"), ("llama", "prompt"), ("llama", "prefix"), ("llama", "lora"),
    ("bert", "prompt"), ("bert", "prefix"), ("bert-tagger", "lora"), ("bert-tagger", "p-tuning"), ("t5", "prompt"),
    ("t5", "prefix"), ("t5", "kinds"), ("t5", "template"), ("bart", "prompt"), ("bart", "prefix"), ("bart", "kinds"),
    ("whisper", "prompt"), ("whisper", "prefix"),
]  # fmt: skip
ROWS = ["a", "__base__", "b", "a"]


def with_two(kind: str, method: str) -> nn.Module:
    """Adapters a and b of different lengths, moved, and heads of their own."""
    model = pm.build(kind)
    for seed, (name, n) in enumerate({"a": 2, "b": 4}.items()):
        attach(model, METHODS[method](n), name)
        pm.move(model, 0.3, seed)
    return model


def alone(model: nn.Module, inputs: dict, row: int, name: str) -> torch.Tensor:
    one = {key: value[row : row + 1] for key, value in inputs.items()}
    if name == "__base__":
        with peftk.disable_adapters(model):
            return pm.logits(model, one)[0]
    peftk.set_adapter(model, name)
    return pm.logits(model, one)[0]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_row_is_what_it_is_alone(kind, method):
    model = with_two(kind, method)
    inputs = pm.batch(
        kind, rows=4, mask=None if kind == "whisper" else "right" if "bert" in kind else "left" if kind in pm.DECODERS else "ones"
    )
    with peftk.adapters_per_row(model, ROWS):
        y = pm.logits(model, inputs)
    for row, name in enumerate(ROWS):
        expected = alone(model, inputs, row, name)
        found = y[row]
        if found.shape != expected.shape:  # a row's own tokens stand on the left where nothing is causal, else on the right
            length = min(len(found), len(expected))
            is_left = "bert" in kind
            found, expected = (part[:length] if is_left else part[-length:] for part in (found, expected))
        if method in ("prompt", "prefix", "template", "lora") and kind in pm.DECODERS and row == 3:
            found, expected = found[-5:], expected[-5:]  # what padding says is nobody's matter
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "method"), [("gpt2", "prompt"), ("llama", "prefix"), ("llama", "lora"), ("t5", "kinds")])
@pytest.mark.parametrize("way", [{}, {"num_beams": 2}], ids=["greedy", "beam"])
def test_generation_with_rows(kind, method, way):
    model = with_two(kind, method)
    inputs = {k: v for k, v in pm.batch(kind, rows=4, mask="ones").items() if k != "labels"}
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, **way}
    with peftk.adapters_per_row(model, ROWS):
        together = model.generate(**inputs, **options)
    for row, name in enumerate(ROWS):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            with peftk.disable_adapters(model):
                expected = model.generate(**one, **options)
        else:
            peftk.set_adapter(model, name)
            expected = model.generate(**one, **options)
        assert torch.equal(together[row, -4:], expected[0, -4:]), row


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_rows_train_their_own(method):
    model = with_two("gpt2", method)
    peftk.set_adapter(model, ["a", "b"])
    inputs = pm.batch("gpt2", rows=2)
    grads = {}
    for names in (["a", "b"], ["a", "__base__"]):
        with peftk.adapters_per_row(model, names):
            pm.backward(model, inputs)
        grads[names[1]] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    has_b = {bool(p.abs().max()) for n, p in grads["b"].items() if ".b" in n}
    assert has_b == {True} and not any(p.abs().max() for n, p in grads["__base__"].items() if ".b" in n)


def in_4_bits(config, base=lambda: peftk.nn.NF4Linear(64, 48)) -> nn.Module:
    """One layer with adapters a and b that aren't zero."""
    model = nn.Sequential(base())
    for name in "ab":
        attach(model, config(), name)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "config",
    [
        lambda: LoraConfig(r=4, target_modules=["0"]),
        lambda: LoraConfig(r=4, target_modules=["0"], use_dora=True),
        lambda: peftk.AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=2, target_modules=["0"]),
    ],
    ids=["lora", "dora", "adalora"],
)
def test_a_layer_in_4_bits_has_all_rows_in_one_op(config, monkeypatch):
    model, calls, op = in_4_bits(config), [], nf4_linear.nf4_lora_linear_rows
    monkeypatch.setattr(nf4_linear, "nf4_lora_linear_rows", lambda *a: calls.append(1) or op(*a))
    x, names = torch.randn(5, 3, 64, requires_grad=True), ["b", "__base__", "a", "b", "a"]
    parameters = [p.requires_grad_() for name in "ab" for p in model[0].adapter_parameters(name)]
    with peftk.adapters_per_row(model, names):
        y = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), y)
    assert len(calls) == (0 if getattr(model[0], "with_dora", None) else 2)
    grads = torch.autograd.grad(y.sum(), (x, *parameters))
    singles = []
    for row, name in enumerate(names):
        with peftk.disable_adapters(model) if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                model[0].set_active([name])
            singles.append(model(x[row]))
    torch.testing.assert_close(y, torch.stack(singles))
    expected = torch.autograd.grad(torch.stack(singles).sum(), (x, *parameters))
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", [lambda: peftk.nn.NF4Linear(64, 48), lambda: nn.Linear(64, 48)], ids=["nf4", "dense"])
def test_rows_drop_out_by_their_own_adapter(base):
    model = in_4_bits(lambda: LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5), base).train()
    model[0].dropout["b"] = 0.0
    x = torch.ones(4, 1, 64).repeat(1, 200, 1)
    with torch.no_grad(), peftk.adapters_per_row(model, ["a", "b", "__base__", "a"]):
        noisy, quiet = model(x), model.eval()(x)
    assert torch.equal(noisy[1:3], quiet[1:3]) and not torch.equal(noisy[0], noisy[3])
    assert (noisy[0] != quiet[0]).any(-1).all()
    share = (quiet[0] - quiet[2])[0].norm()
    assert (noisy[0].mean(0) - quiet[0, 0]).norm() < 0.3 * share


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_rows_of_an_adapter_that_started_in_the_weight(start):
    model = nn.Sequential(nn.Linear(64, 48))
    attach(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=start), "a")
    attach(model, LoraConfig(r=4, target_modules=["0"]), "b")
    nn.init.normal_(model[0].lora_B["b"])
    x, names = torch.randn(4, 2, 64), ["b", "__base__", "a", "b"]
    with torch.no_grad(), peftk.adapters_per_row(model, names):
        y = model(x)
    for row, name in enumerate(names):
        with torch.no_grad(), peftk.disable_adapters(model) if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                peftk.set_adapter(model, name)
            torch.testing.assert_close(y[row], model(x[row]), rtol=1e-4, atol=1e-5)


def test_the_context_ends_and_nests():
    model = with_two("gpt2", "prefix")
    inputs = pm.batch("gpt2")
    y = pm.logits(model, inputs)
    with pytest.raises(KeyError), peftk.adapters_per_row(model, ["a", "b"]):
        with peftk.adapters_per_row(model, ["__base__"] * 2), peftk.disable_adapters(model):
            base = pm.logits(model, inputs)
        assert not torch.allclose(pm.logits(model, inputs), y)
        raise KeyError
    assert torch.equal(pm.logits(model, inputs), y)
    with peftk.disable_adapters(model):
        assert torch.equal(pm.logits(model, inputs), base)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_vote_of_prompts(kind):
    model = with_two(kind, "prompt")
    pm.move(attach(model, PromptTuningConfig(num_virtual_tokens=3), "c"), 0.3, 7)
    inputs = pm.batch(kind, rows=3, mask="ones")
    found = peftk.prompt_ensemble(model, ["a", "b", "c"], **inputs)
    single = []
    for name in "abc":
        peftk.set_adapter(model, name)
        single.append(pm.logits(model, inputs))
    torch.testing.assert_close(found.logits.detach(), torch.stack(single), rtol=1e-3, atol=1e-4)
    votes = torch.stack(single).argmax(-1)
    assert torch.equal(found.predictions, _majority(votes, torch.stack(single)))


def _majority(votes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    mean = logits.softmax(-1).mean(0)
    flat, likely = votes.flatten(1).T.tolist(), mean.flatten(0, -2)
    chosen = [max(set(v), key=lambda c, v=v, at=at: (v.count(c), likely[at, c].item())) for at, v in enumerate(flat)]
    return torch.tensor(chosen).view(votes.shape[1:])


def test_bad_arguments_are_named():
    model = with_two("gpt2", "prompt")
    inputs = pm.batch("gpt2", rows=3)
    for names, message in [
        (["a", "z"], "names: no adapter called 'z'; attached are a, b"),
        ([], "names: expected a list with a name for each row"),
        ("a", "names: expected a list with a name for each row, got 'a'"),
    ]:
        with pytest.raises(ValueError, match=message), peftk.adapters_per_row(model, names):
            pass
    with pytest.raises(ValueError, match="names: expected a batch of 2 rows or a multiple of it, got 3"):
        with peftk.adapters_per_row(model, ["a", "b"]):
            model(**inputs)
    with pytest.raises(ValueError, match="inputs: expected tensors"):
        peftk.prompt_ensemble(model, ["a"])
    attach(model, LoraConfig(target_modules=["c_attn"], bias="all"), "l")
    with pytest.raises(ValueError, match="leave the base's biases alone, got 'l'"), peftk.adapters_per_row(model, ["a"]):
        pass
    model = pm.move(attach(pm.build("gpt2"), LoraConfig(target_modules=["c_attn"]), "l"))
    peftk.merge(model)
    with pytest.raises(ValueError, match="names: expected a model without merged adapters, got one with l"):
        with peftk.adapters_per_row(model, ["l"]):
            pass
