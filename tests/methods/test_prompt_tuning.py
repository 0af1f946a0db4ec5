"""Prompt Tuning against HF peft, its start, and what its files hold."""

from __future__ import annotations

import json

import prompt_models as pm
import pytest
import tiny_models as tiny
import torch

import peftk
from peftk import PromptTuningConfig, attach

peft = pytest.importorskip("peft")
N = 3


def tuned(kind: str, **fields) -> torch.nn.Module:
    return attach(pm.build(kind), PromptTuningConfig(num_virtual_tokens=N, **fields))


def weight(model: torch.nn.Module, name: str = "default") -> torch.nn.Parameter:
    return model.input_prompts.prompt_embeddings[name].weight


def twins(kind: str, attention: str = "sdpa"):
    """(ours, HF peft's) with the same prompt."""
    base = pm.build(kind, attention)
    theirs = pm.hf(base, peft.PromptTuningConfig(num_virtual_tokens=N, task_type=pm.MODELS[kind][1]))
    ours = attach(base, PromptTuningConfig(num_virtual_tokens=N))
    with torch.no_grad():
        weight(ours).copy_(theirs.prompt_encoder["default"].embedding.weight)
    return ours, theirs


def hf_inputs(kind: str, inputs: dict) -> dict:
    """HF peft doesn't lengthen the labels of token classification: its loss raises."""
    return {k: v for k, v in inputs.items() if kind != "bert-tagger" or k != "labels"}


@pytest.mark.parametrize("mask", [None, "ones", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "bert-tagger", "t5", "bart"])
def test_outputs_and_gradients_equal_hf(kind, mask):
    ours, theirs = twins(kind)
    inputs = pm.batch(kind, mask=mask)
    (y, loss), (y_hf, loss_hf) = pm.backward(ours, inputs), pm.backward(theirs, hf_inputs(kind, inputs))
    assert torch.equal(y, y_hf) and (loss_hf is None or torch.equal(loss, loss_hf))
    assert torch.equal(weight(ours).grad, theirs.prompt_encoder["default"].embedding.weight.grad)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_generates_as_hf(kind, way):
    pm.skip_where_peer_loses_the_cache()
    ours, theirs = twins(kind)
    inputs = {k: v for k, v in pm.batch(kind, mask="ones").items() if k != "labels"}
    assert torch.equal(
        ours.generate(**inputs, max_new_tokens=6, do_sample=False, **way),
        theirs.generate(**inputs, max_new_tokens=6, do_sample=False, **way),
    )


def test_left_padding_and_generation_equal_single_examples():
    """HF peft counts positions through the padding; here a padded row is what it is alone."""
    for kind in pm.DECODERS:
        model = pm.move(tuned(kind))
        inputs = pm.batch(kind, mask="left")
        alone = {"input_ids": inputs["input_ids"][-1:, 2:]}
        torch.testing.assert_close(pm.logits(model, inputs | {"labels": None})[-1, -5:], pm.logits(model, alone)[0, -5:])
        new = model.generate(**inputs | {"labels": None}, max_new_tokens=5, do_sample=False)[-1, -5:]
        assert torch.equal(new, model.generate(**alone, max_new_tokens=5, do_sample=False)[0, -5:])


def test_a_cache_of_ones_own_and_no_cache_agree():
    model = pm.move(tuned("gpt2"))
    ids = pm.batch("gpt2")["input_ids"]
    whole = pm.logits(model, {"input_ids": ids})
    with torch.no_grad():
        first = model(input_ids=ids[:, :4], use_cache=True)
        second = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    assert first.past_key_values.get_seq_length() == N + ids.shape[1]
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4)


def test_embeddings_as_inputs_and_given_positions():
    model = pm.move(tuned("llama"))
    ids = pm.batch("llama")["input_ids"]
    y = pm.logits(model, {"input_ids": ids})
    assert torch.equal(pm.logits(model, {"inputs_embeds": model.get_input_embeddings()(ids)}), y)
    positions = torch.arange(ids.shape[1])[None]
    assert torch.equal(pm.logits(model, {"input_ids": ids, "position_ids": positions}), y)
    assert not torch.allclose(pm.logits(model, {"input_ids": ids, "position_ids": positions * 2}), y, atol=1e-3)


def test_the_embedding_is_itself_again_after_the_call():
    model = pm.move(tuned("llama"))
    inputs = pm.batch("llama")
    pm.logits(model, inputs)
    embedding, ids = model.get_input_embeddings(), torch.full((2, N + inputs["input_ids"].shape[1]), 5)
    assert torch.equal(embedding(ids), embedding.weight[ids])


def test_a_padded_row_is_classified_by_its_last_token():
    """HF peft hands embeddings on, and the last column, padding, is classified."""
    model = pm.move(tuned("llama-classifier"))
    inputs = pm.batch("llama-classifier", mask="right")
    alone = {"input_ids": inputs["input_ids"][-1:, :-2]}
    torch.testing.assert_close(pm.logits(model, inputs)[-1:], pm.logits(model, alone))
    assert any("score" in name for name, p in model.named_parameters() if p.requires_grad)


def test_answers_spans_move_with_the_prompt():
    transformers = pytest.importorskip("transformers")
    config = tiny.bert().config
    config.num_labels = 2
    model = transformers.BertForQuestionAnswering(config).eval()
    attach(model, PromptTuningConfig(num_virtual_tokens=N))
    ids = pm.batch("bert")["input_ids"]
    spans = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    out = model(input_ids=ids, **spans)
    target = torch.nn.functional.cross_entropy
    expected = (target(out.start_logits, spans["start_positions"] + N) + target(out.end_logits, spans["end_positions"] + N)) / 2
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("kind", ["whisper"])
def test_prompts_stand_before_the_decoder_where_the_encoder_takes_no_tokens(kind):
    model = pm.move(tuned(kind))
    inputs = pm.batch(kind)
    y, _ = pm.backward(model, inputs)
    assert y.shape[1] == N + inputs["labels"].shape[1] and weight(model).grad.abs().min() > 0
    features = {"input_features": inputs["input_features"]}
    ids = torch.full((2, 1), model.config.decoder_start_token_id)
    for _ in range(3):
        ids = torch.cat([ids, pm.logits(model, {**features, "decoder_input_ids": ids})[:, -1:].argmax(-1)], 1)
    greedy = model.generate(**features, decoder_input_ids=ids[:, :1], max_new_tokens=3, do_sample=False)
    assert torch.equal(greedy[:, -3:], ids[:, -3:])


@pytest.mark.parametrize("base", ["nf4", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_on_other_bases_and_under_checkpointing(kind, base):
    model = attach(pm.build(kind, base=base), PromptTuningConfig(num_virtual_tokens=N)).train()
    inputs = pm.batch(kind, mask="ones")
    y, _ = pm.backward(model, inputs)
    grad = weight(model).grad.clone()
    assert weight(model).dtype == torch.float32 and grad.abs().max() > 0
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again, _ = pm.backward(model, inputs)
        for a, b in (
            (again, y),
            (weight(model).grad, grad),
        ):  # without a cache T5's keys have other strides, and sums another order
            assert (a - b).norm() <= (0.1 if base == "bf16" else 1e-5) * b.norm()


def test_disabled_and_detached_are_the_original():
    for kind in ("gpt2", "bert", "t5", "whisper"):
        model, inputs = pm.build(kind), pm.batch(kind)
        before, y = tiny.state_of(model), pm.logits(model, inputs)
        hooks = hook_count(model)
        pm.move(attach(model, PromptTuningConfig(num_virtual_tokens=N)))
        assert pm.logits(model, inputs).shape != y.shape or not torch.allclose(pm.logits(model, inputs), y)
        with peftk.disable_adapters(model):
            assert torch.equal(pm.logits(model, inputs), y)
        peftk.detach(model)
        tiny.assert_same_state(before, tiny.state_of(model))
        assert torch.equal(pm.logits(model, inputs), y) and hook_count(model) == hooks


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_several_prompts_stand_one_behind_the_other():
    model = pm.build("llama")
    inputs = {"input_ids": pm.batch("llama")["input_ids"]}
    pm.move(attach(model, PromptTuningConfig(num_virtual_tokens=2), "a"), seed=1)
    pm.move(attach(model, PromptTuningConfig(num_virtual_tokens=3), "b"), seed=2)
    peftk.set_adapter(model, ["b", "a"])
    together = pm.logits(model, inputs)
    assert together.shape[1] == 5 + 7
    one = attach(pm.build("llama"), PromptTuningConfig(num_virtual_tokens=5))
    with torch.no_grad():
        weight(one).copy_(torch.cat([weight(model, "b"), weight(model, "a")]))
    assert torch.equal(pm.logits(one, inputs), together)
    peftk.delete_adapter(model, "a")
    assert pm.logits(model, inputs).shape[1] == 3 + 7
    peftk.delete_adapter(model, "b")
    assert not hasattr(model, "input_prompts") and hook_count(model) == hook_count(pm.build("llama"))


def test_beside_lora_and_no_merging():
    model = pm.build("llama")
    attach(model, peftk.LoraConfig(target_modules=["q_proj"]), "lora")
    attach(model, PromptTuningConfig(num_virtual_tokens=N), "prompt")
    pm.move(model)
    peftk.set_adapter(model, ["lora", "prompt"])
    y = pm.logits(pm.move(model), {"input_ids": pm.batch("llama")["input_ids"]})
    before = tiny.state_of(model)
    for names in (None, "prompt"):
        with pytest.raises(ValueError, match="adapter_names: expected adapters of weights, got prompt"):
            peftk.merge(model, names)
        tiny.assert_same_state(before, tiny.state_of(model))
    peftk.merge(model, "lora")
    torch.testing.assert_close(pm.logits(model, {"input_ids": pm.batch("llama")["input_ids"]}), y, rtol=1e-4, atol=1e-4)


def test_a_trained_copy_of_the_embedding_takes_the_prompt_too():
    """Hooks are copied with a module: the copy's must act for the same prompts, not for a copy of them."""
    model = attach(pm.build("gpt2"), PromptTuningConfig(num_virtual_tokens=N), "prompt")
    inputs = pm.batch("gpt2")
    y = pm.logits(model, inputs)
    attach(model, peftk.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"]), "lora")
    peftk.set_adapter(model, ["prompt", "lora"])
    assert torch.equal(pm.logits(model, inputs), y)
    peftk.delete_adapter(model, "prompt")
    peftk.detach(model)
    assert not any(hook_count(part) for part in model.modules())


def test_report_counts_the_prompt():
    model = tuned("llama")
    report = peftk.report(model)
    assert report.trainable.elements == N * 32 and len(peftk.trainable_parameters(model)) == 1


def test_starts_from_words():
    embedding = pm.build("llama").get_input_embeddings().weight.detach()
    ids = pm.words("one two three four")["input_ids"]
    text = {"prompt_tuning_init": "TEXT", "tokenizer": pm.words}
    assert torch.equal(weight(tuned("llama", **text, prompt_tuning_init_text="one two three four")), embedding[ids[:3]])
    short = weight(tuned("llama", **text, prompt_tuning_init_text="one two"))
    assert torch.equal(short, embedding[[ids[0], ids[1], ids[0]]])
    labels = weight(tuned("llama", prompt_tuning_init="CLASS_LABELS", class_labels=["one-two", "three"], tokenizer=pm.words))
    assert torch.equal(labels[0], embedding[ids[:2]].mean(0)) and torch.equal(labels[1], embedding[ids[2]])
    some = weight(tuned("llama", prompt_tuning_init="SAMPLE_VOCAB", frequent_token_ids=[7, 8, 9]))
    assert {tuple(row.tolist()) for row in some} == {tuple(row.tolist()) for row in embedding[[7, 8, 9]]}
    low = weight(tuned("llama", prompt_tuning_init="SAMPLE_VOCAB", sample_vocab_size=N))
    assert {tuple(row.tolist()) for row in low} == {tuple(row.tolist()) for row in embedding[[2, 3, 4]]}, "0 and 1 are special"
    wide = attach(pm.build("llama"), PromptTuningConfig(num_virtual_tokens=25))
    assert abs(weight(wide).std().item() - 1) < 0.1


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_files_both_ways(kind, tmp_path):
    ours = pm.move(tuned(kind))
    inputs = pm.batch(kind)
    y = pm.logits(ours, inputs)
    peftk.save_adapter(ours, tmp_path / "ours")
    with_hf = peft.PeftModel.from_pretrained(pm.build(kind), tmp_path / "ours")
    assert torch.equal(pm.logits(with_hf, inputs), y)
    with_hf.save_pretrained(tmp_path / "hf")
    for folder in ("ours", "hf"):
        loaded = peftk.load_adapter(pm.build(kind), tmp_path / folder)
        assert torch.equal(pm.logits(loaded, inputs), y) and not peftk.trainable_parameters(loaded)
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "PROMPT_TUNING" and fields["token_dim"] == 32


def test_training_goes_on_without_the_tokenizer_it_began_with(tmp_path):
    ours = tuned("gpt2", prompt_tuning_init="TEXT", prompt_tuning_init_text="one two", tokenizer=pm.words)
    peftk.save_adapter(ours, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    began = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "one", "tokenizer_name_or_path": "no/such-tokenizer"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **began}))
    twin = peftk.load_adapter(pm.build("gpt2"), tmp_path / "a", is_trainable=True)
    assert torch.equal(weight(twin), weight(ours)) and weight(twin).requires_grad


def test_bad_arguments_are_named_and_nothing_is_attached():
    bad = [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: expected a positive integer, got 0"),
        ({}, "num_virtual_tokens: expected a positive integer, got None"),
        ({"prompt_tuning_init": "WORDS"}, "prompt_tuning_init: expected one of"),
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text: expected a text"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}, "tokenizer: expected one"),
        ({"prompt_tuning_init": "CLASS_LABELS", "tokenizer": pm.words}, "class_labels: expected a list"),
        ({"task_type": "TALK"}, "task_type: expected None or one of"),
    ]
    for fields, message in bad:
        with pytest.raises(ValueError, match=message):
            PromptTuningConfig(**{"num_virtual_tokens": N if fields else None} | fields)
    with pytest.raises(TypeError, match="no_such_field"):
        PromptTuningConfig(num_virtual_tokens=N, no_such_field=1)
    wrong = [
        ({"num_virtual_tokens": 32}, "num_virtual_tokens: expected fewer than the model's 32 positions, got 32"),
        ({"num_virtual_tokens": N, "token_dim": 64}, "token_dim: expected 32, as the model has it, got 64"),
        ({"num_virtual_tokens": N, "modules_to_save": ["nothing"]}, "modules_to_save: expected names of modules"),
        (
            {"num_virtual_tokens": N, "prompt_tuning_init": "SAMPLE_VOCAB", "frequent_token_ids": [99]},
            "frequent_token_ids: expected ids below 61, the model's, got 99",
        ),
    ]
    for fields, message in wrong:
        model = pm.build("llama")
        before = tiny.state_of(model)
        with pytest.raises(ValueError, match=message):
            attach(model, PromptTuningConfig(**fields))
        tiny.assert_same_state(before, tiny.state_of(model))
    with pytest.raises(ValueError, match="model: expected one whose forward takes input_ids, got Net"):
        attach(tiny.Net(), PromptTuningConfig(num_virtual_tokens=N))
    model = attach(pm.build("gpt2"), PromptTuningConfig(num_virtual_tokens=20))
    with pytest.raises(ValueError, match="num_virtual_tokens: expected at most 32 positions .*got 40, of which 20"):
        model(input_ids=torch.ones(1, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask: expected .batch, length."):
        model(input_ids=torch.ones(1, 5, dtype=torch.long), attention_mask=torch.ones(1, 1, 5, 5))
