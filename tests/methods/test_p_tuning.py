"""P-Tuning: encoders and prepended tokens against HF peft; places of its own against the embeddings written by hand."""

from __future__ import annotations

import copy
import json
import pickle

import prompt_models as pm
import pytest
import tiny_models as tiny
import torch

import peftk
from peftk import PTuningConfig, attach

peft = pytest.importorskip("peft")
N = 4


class Words:
    """A tokenizer with special tokens."""

    mask_token_id, cls_token_id, sep_token_id, all_special_ids = 56, 57, 58, [56, 57, 58]

    def __call__(self, text: str) -> dict[str, list[int]]:
        return pm.words(text)


def tuned(kind: str, **fields) -> torch.nn.Module:
    """With a small encoder and, by it, vectors that aren't small."""
    model = pm.move(attach(pm.build(kind), PTuningConfig(**{"encoder_hidden_size": 8} | fields)))
    if hasattr(model, "classifier"):  # with adapters disabled only the prompt is to be missing
        model.classifier.original_module.load_state_dict(model.classifier.modules_to_save["default"].state_dict())
    return model


def encoder(model: torch.nn.Module) -> torch.nn.Module:
    return model.input_prompts.prompt_embeddings["default"]


@pytest.mark.parametrize("way", ["MLP", "LSTM"])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_outputs_and_gradients_equal_hf(kind, way):
    fields = {"num_virtual_tokens": N, "encoder_reparameterization_type": way, "encoder_hidden_size": 8}
    base = pm.build(kind)
    theirs = pm.hf(base, peft.PromptEncoderConfig(task_type=pm.MODELS[kind][1], **fields))
    ours = attach(base, PTuningConfig(**fields))
    hf = theirs.prompt_encoder["default"]
    encoder(ours).load_state_dict(hf.state_dict())
    inputs = pm.batch(kind, mask="right")
    (y, loss), (y_hf, loss_hf) = pm.backward(ours, inputs), pm.backward(theirs, inputs)
    torch.testing.assert_close(y, y_hf, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, loss_hf)
    grads = dict(hf.named_parameters())
    assert grads.keys() == dict(encoder(ours).named_parameters()).keys()
    for name, parameter in encoder(ours).named_parameters():
        torch.testing.assert_close(
            parameter.grad, grads[name].grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("way", ["MLP", "LSTM", "NONE"])
def test_files_both_ways_and_training_that_goes_on(way, tmp_path):
    fields = {"num_virtual_tokens": N, "encoder_reparameterization_type": way}
    ours, inputs = tuned("gpt2", **fields), pm.batch("gpt2")
    y = pm.logits(ours, inputs)
    peftk.save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(pm.logits(peft.PeftModel.from_pretrained(pm.build("gpt2"), tmp_path / "ours"), inputs), y)
    loaded = peftk.load_adapter(pm.build("gpt2"), tmp_path / "ours")
    torch.testing.assert_close(pm.logits(loaded, inputs), y)
    assert encoder(loaded).is_plain and (tmp_path / "ours" / "peftk_encoder.safetensors").exists() == (way != "NONE")
    twin = peftk.load_adapter(pm.build("gpt2"), tmp_path / "ours", is_trainable=True)
    for model in (ours, twin):
        model(**inputs).loss.backward()
    for a, b in zip(peftk.trainable_parameters(ours), peftk.trainable_parameters(twin), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)
    if way != "NONE":
        theirs = pm.hf(pm.build("gpt2"), peft.PromptEncoderConfig(task_type="CAUSAL_LM", encoder_hidden_size=8, **fields))
        theirs.save_pretrained(tmp_path / "hf")
        loaded = peftk.load_adapter(pm.build("gpt2"), tmp_path / "hf", is_trainable=True)
        torch.testing.assert_close(pm.logits(loaded, inputs), pm.logits(theirs, inputs))
        assert encoder(loaded).is_plain and len(peftk.trainable_parameters(loaded)) == 1, "HF peft's file has no encoder"


def by_hand(model: torch.nn.Module, parts: list, **inputs) -> torch.Tensor:
    """Logits of one row: ints are token ids, ("v", i) virtual tokens."""
    table, embedding = encoder(model)().detach(), model.get_input_embeddings()
    rows = [table[part[1]] if isinstance(part, tuple) else embedding.weight[part] for part in parts]
    with torch.no_grad(), peftk.disable_adapters(model):
        return model(inputs_embeds=torch.stack(rows)[None], **inputs).logits


@pytest.mark.parametrize("token", [3, 1000], ids=["in the vocabulary", "beyond"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert-tagger"])
def test_placeholders_stand_anywhere(kind, token):
    model = tuned(kind, num_virtual_tokens=N, placeholder_token_id=token)
    ids = torch.tensor([[token, 10, token, 11, 12, token, token], [13, 14, 15, token, token, token, token]])
    y = pm.logits(model, {"input_ids": ids})
    assert y.shape[:2] == ids.shape
    for row in range(2):
        at = iter(range(N))
        parts = [("v", next(at)) if i == token else i for i in ids[row].tolist()]
        torch.testing.assert_close(y[row : row + 1], by_hand(model, parts), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=rf"input_ids: row 1: expected 4 placeholders \(token {token}\), got 3"):
        model(input_ids=torch.where((ids == token) & (torch.arange(14).view(2, 7) == 13), 9, ids))
    with pytest.raises(ValueError, match="input_ids: expected ids, to find placeholders in"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_template_with_words(kind):
    model = tuned(kind, template="[v]*2 {x} [v] is a [MASK] [v]", tokenizer=Words())
    is_a = pm.words("is a")["input_ids"]
    inputs = {
        "input_ids": torch.tensor([[10, 11, 12, 13], [0, 0, 20, 21]]),
        "attention_mask": torch.tensor([[1] * 4, [0, 0, 1, 1]]),
    }
    y = pm.logits(model, inputs)
    assert y.shape[1] == 4 + 7
    for row, tokens in ((0, [10, 11, 12, 13]), (1, [20, 21])):
        parts = [("v", 0), ("v", 1), *tokens, ("v", 2), *is_a, 56, ("v", 3)]
        torch.testing.assert_close(y[row, -len(parts) :], by_hand(model, parts)[0], rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(**inputs, **options)
    alone = model.generate(input_ids=torch.tensor([[20, 21]]), **options)
    assert torch.equal(together[1, -5:], alone[0, -5:])


def test_a_template_around_an_encoders_row():
    model = tuned("bert-tagger", template="[cls] [v]*2 {x} [v]*2 [sep]", tokenizer=Words())
    inputs = {"input_ids": torch.tensor([[10, 11, 12], [20, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    labels = torch.tensor([[1, 2, 0], [2, 1, 1]])
    out = model(**inputs, labels=labels)
    for row, tokens in ((0, [10, 11, 12]), (1, [20])):
        parts = [57, ("v", 0), ("v", 1), *tokens, ("v", 2), ("v", 3), 58]
        torch.testing.assert_close(out.logits[row, : len(parts)], by_hand(model, parts)[0], rtol=1e-4, atol=1e-5)
    flat = torch.cat([out.logits[0, 3:6], out.logits[1, 3:4]])
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(flat, torch.tensor([1, 2, 0, 2])))


def test_a_template_in_an_encoder_decoder_model():
    model = tuned("t5", template="[v]*2 {x} [v]*2 word", tokenizer=Words())
    inputs = pm.batch("t5", mask="right")
    y = pm.logits(model, inputs)
    alone = pm.logits(
        model,
        {"input_ids": inputs["input_ids"][-1:, :-2], "labels": inputs["labels"][-1:]}
        | {"attention_mask": torch.ones(1, 5, dtype=torch.long)},
    )
    torch.testing.assert_close(y[-1:], alone, rtol=1e-4, atol=1e-5)
    with peftk.disable_adapters(model):
        assert not torch.allclose(pm.logits(model, inputs), y, atol=1e-3)


def test_copies_and_pickles_are_independent():
    model = tuned("gpt2", template="[v]*2 {x} [v]", tokenizer=Words())
    inputs = pm.batch("gpt2")
    y = pm.logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(pm.logits(twin, inputs), y)
        pm.move(twin, seed=9)
        assert torch.equal(pm.logits(model, inputs), y) and not torch.equal(pm.logits(twin, inputs), y)


def test_positions():
    model = tuned("gpt2", positions=[0, 0, 2, 3])
    y = pm.logits(model, {"input_ids": torch.tensor([[10, 11, 12]])})
    torch.testing.assert_close(y, by_hand(model, [("v", 0), ("v", 1), 10, 11, ("v", 2), 12, ("v", 3)]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="input_ids: row 0: expected positions up to its 2 tokens, got 3"):
        model(input_ids=torch.tensor([[10, 11]]))


def test_anchors_start_from_words():
    model = attach(
        pm.build("gpt2"),
        PTuningConfig(num_virtual_tokens=3, encoder_reparameterization_type="NONE", init_token_ids=[7, None, 9]),
    )
    embedding = model.get_input_embeddings().weight
    assert torch.equal(encoder(model)()[[0, 2]], embedding[[7, 9]]) and not torch.equal(encoder(model)()[1], embedding[0])


@pytest.mark.parametrize("config", [PTuningConfig, peftk.PrefixTuningConfig])
def test_an_encoder_stays_dense_and_is_dropped_on_request(config):
    fields = {"prefix_projection": True} if config is peftk.PrefixTuningConfig else {}
    model = pm.move(attach(pm.build("gpt2"), config(num_virtual_tokens=N, **fields)))
    y = pm.logits(model, pm.batch("gpt2"))
    peftk.drop_encoder(model)
    torch.testing.assert_close(pm.logits(model, pm.batch("gpt2")), y)
    assert all("encoder" not in n and "embedding.weight" not in n for n, p in model.named_parameters() if p.requires_grad)
    assert len(peftk.trainable_parameters(model)) == (2 if fields else 1)
    with pytest.raises(ValueError, match="adapter_name: expected an adapter with an encoder, got 'default'"):
        peftk.drop_encoder(model)
    with pytest.raises(ValueError, match="adapter_name: no adapter called 'x'"):
        peftk.drop_encoder(model, "x")
    model = attach(pm.build("gpt2"), config(num_virtual_tokens=N, **fields))
    peftk.quantize_model(model, progress=False)
    assert all(p.dtype == torch.float32 for p in peftk.trainable_parameters(model))


@pytest.mark.parametrize("way", ["MLP", "LSTM"])
def test_checkpointing_and_training_reach_the_whole_encoder(way):
    model = tuned("llama", template="[v]*2 {x} [v]*2", tokenizer=Words(), encoder_reparameterization_type=way).train()
    inputs = pm.batch("llama")
    y, _ = pm.backward(model, inputs)
    grads = [p.grad.clone() for p in peftk.trainable_parameters(model)]
    assert all(grad.abs().max() > 0 for grad in grads)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again, _ = pm.backward(model, inputs)
        torch.testing.assert_close(again, y)
        for a, b in zip(peftk.trainable_parameters(model), grads, strict=True):
            torch.testing.assert_close(a.grad, b)


@pytest.mark.parametrize(
    "fields",
    [
        {"template": "[v]*2 {x} [v] is a [mask] [v]", "tokenizer": Words()},
        {"num_virtual_tokens": N, "placeholder_token_id": 60},
        {"positions": [0, 1, 2, 3]},
    ],
    ids=["template", "placeholder", "positions"],
)
def test_places_hf_cannot_represent_it_refuses(fields, tmp_path):
    ours = tuned("gpt2", **fields)
    ids = torch.tensor([[10, 60, 60, 11, 60, 60]])
    peftk.save_adapter(ours, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "PEFTK_P_TUNING"
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(pm.build("gpt2"), tmp_path / "a")
    for is_trainable in (False, True):
        loaded = peftk.load_adapter(pm.build("gpt2"), tmp_path / "a", is_trainable=is_trainable)
        torch.testing.assert_close(pm.logits(loaded, {"input_ids": ids}), pm.logits(ours, {"input_ids": ids}))


def test_placed_prompts_stand_alone():
    model = tuned("gpt2", num_virtual_tokens=N, placeholder_token_id=60)
    attach(model, peftk.PromptTuningConfig(num_virtual_tokens=2), "front")
    with pytest.raises(ValueError, match="names: expected prompts that stand in front .*default has places of its own"):
        peftk.set_adapter(model, ["front", "default"])
    attach(model, peftk.PrefixTuningConfig(num_virtual_tokens=2), "prefix")
    peftk.set_adapter(model, ["prefix", "default"])
    assert pm.logits(model, {"input_ids": torch.tensor([[60, 5, 60, 60, 60]])}).shape[1] == 5


def test_bad_arguments_are_named_and_nothing_is_attached():
    some = {"num_virtual_tokens": N}
    bad = [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: expected a positive integer, got 0"),
        (some | {"encoder_reparameterization_type": "GRU"}, "encoder_reparameterization_type: expected one of MLP, LSTM, NONE"),
        (some | {"encoder_dropout": 2}, "encoder_dropout: expected a probability"),
        (some | {"encoder_num_layers": 0}, "encoder_num_layers: expected a positive"),
        (some | {"placeholder_token_id": -1}, "placeholder_token_id: expected None or a token id"),
        (some | {"placeholder_token_id": 3, "positions": [0] * 4}, "positions: expected None beside placeholder_token_id"),
        ({"positions": [2, 1]}, "positions: expected None or ascending"),
        (some | {"positions": [0, 1]}, "positions: expected num_virtual_tokens=4 virtual tokens, got 2"),
        (some | {"init_token_ids": [1]}, "init_token_ids: expected a token id, or None, for each virtual token"),
        ({"template": "[v]*3"}, "template: expected one {x} and at least one"),
        ({"template": "{x} [v] word"}, "tokenizer: expected one"),
        ({"template": "{x} [v] [mask]", "tokenizer": pm.words}, "template: expected a tokenizer with a mask token, got function"),
        (some | {"template": "{x} [v]"}, "template: expected num_virtual_tokens=4 virtual tokens, got 1"),
    ]
    for fields, message in bad:
        with pytest.raises(ValueError, match=message):
            PTuningConfig(**fields)
    for fields, message in [
        ({"num_virtual_tokens": 32}, "num_virtual_tokens: expected fewer than the model's 32 positions"),
        ({"num_virtual_tokens": 2, "init_token_ids": [1, 61]}, "init_token_ids: expected ids below 61, the model's, got 61"),
    ]:
        model = pm.build("gpt2")
        before = tiny.state_of(model)
        with pytest.raises(ValueError, match=message):
            attach(model, PTuningConfig(**fields))
        tiny.assert_same_state(before, tiny.state_of(model))
