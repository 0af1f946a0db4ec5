"""Prefix Tuning against HF peft and single examples, and what HF peft can't: checkpointing, kinds, infix, starts from words."""

from __future__ import annotations

import copy
import json
import pickle

import prompt_models as pm
import pytest
import tiny_models as tiny
import torch

import peftk
from peftk import PrefixTuningConfig, attach

peft = pytest.importorskip("peft")
N = 3


def prefixed(kind: str, base: str = "dense", **fields) -> torch.nn.Module:
    return attach(pm.build(kind, base=base), PrefixTuningConfig(**{"num_virtual_tokens": N} | fields))


def encoder(model: torch.nn.Module, name: str = "default") -> torch.nn.Module:
    return model.deep_prompts.prompt_embeddings[name]


def twins(kind: str, attention: str = "sdpa", projection: bool = False, model=None):
    """(ours, HF peft's) with the same prefix."""
    base = pm.build(kind, attention) if model is None else model
    fields = {"num_virtual_tokens": N, "prefix_projection": projection, "encoder_hidden_size": 12 if projection else None}
    theirs = pm.hf(base, peft.PrefixTuningConfig(task_type=pm.MODELS[kind][1], **fields))
    ours = attach(base, PrefixTuningConfig(**fields))
    theirs_encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        if projection:
            ours_encoder = encoder(ours).prefixes["self"]
            ours_encoder.embedding.weight.copy_(theirs_encoder.embedding.weight)
            ours_encoder.hidden.load_state_dict(theirs_encoder.transform[0].state_dict())
            for part in ("weight", "bias"):
                rows = getattr(theirs_encoder.transform[2], part).chunk(len(ours_encoder.out))
                for layer, values in zip(ours_encoder.out, rows, strict=True):
                    getattr(layer, part).copy_(values)
        else:
            encoder(ours).load_flat({"prompt_embeddings": theirs_encoder.embedding.weight})
    return ours, theirs


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """In the file's shape; zero where nothing came."""
    pairs = encoder(model).prefixes["self"].pairs
    return torch.cat([torch.zeros_like(pair) if pair.grad is None else pair.grad for pair in pairs], dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, "ones", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "bert-tagger", "t5", "bart"])
def test_outputs_and_gradients_equal_hf(kind, mask, attention):
    if kind.startswith("bert"):
        pm.skip_where_peer_loses_the_cache()
    ours, theirs = twins(kind, attention)
    inputs = pm.batch(kind, mask=mask)
    (y, loss), (y_hf, loss_hf) = pm.backward(ours, inputs), pm.backward(theirs, inputs)
    assert torch.equal(y, y_hf) and torch.equal(loss, loss_hf)
    torch.testing.assert_close(gradient(ours), theirs.prompt_encoder["default"].embedding.weight.grad, rtol=1e-5, atol=1e-6)
    with peftk.disable_adapters(ours):
        assert not torch.allclose(pm.logits(ours, inputs), y, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_projection_equals_hf(kind):
    ours, theirs = twins(kind, projection=True)
    inputs = pm.batch(kind)
    (y, _), (y_hf, _) = pm.backward(ours, inputs), pm.backward(theirs, inputs)
    torch.testing.assert_close(y, y_hf, rtol=1e-5, atol=1e-5)
    mine, hf = encoder(ours).prefixes["self"], theirs.prompt_encoder["default"]
    torch.testing.assert_close(mine.embedding.weight.grad, hf.embedding.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.hidden.weight.grad, hf.transform[0].weight.grad, rtol=1e-4, atol=1e-5)


def test_hf_pefts_layers_of_a_decoder_share_prefixes():
    """The tensor is doubled and cut by four: layer l of L has the keys and values of 2l modulo L."""
    transformers = pytest.importorskip("transformers")
    config = pm.build("t5").config
    config.num_layers = config.num_decoder_layers = 3
    torch.manual_seed(0)
    ours, theirs = twins("t5", model=transformers.T5ForConditionalGeneration(config).eval())
    inputs = pm.batch("t5")
    assert torch.equal(pm.logits(ours, inputs), pm.logits(theirs, inputs))
    assert [encoder(ours).index[at][1] for at in encoder(ours).index] == [0, 2, 1]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_positions_that_are_given_are_moved_as_by_hf(kind):
    ours, theirs = twins(kind)
    inputs = pm.batch(kind, mask="left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(pm.logits(ours, inputs), pm.logits(theirs, inputs))


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beam", "sample"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_generates_as_hf(kind, way):
    pm.skip_where_peer_loses_the_cache()
    if pm.is_4() and kind not in pm.DECODERS:
        pytest.skip("on transformers 4 HF peft's generate differs from its own forward passes here")
    ours, theirs = twins(kind)
    inputs = {k: v for k, v in pm.batch(kind, mask="left" if kind in pm.DECODERS else "ones").items() if k != "labels"}
    made = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        made.append(model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, "use_cache": True} | way))
    assert torch.equal(*made)


@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart", "whisper"])
def test_any_cache_gives_the_same(kind, cache):
    kinds = {"whisper": ["self", "cross"], "t5": ["encoder", "self", "cross"], "bart": ["encoder", "self", "cross"]}
    model = pm.move(prefixed(kind, attentions=kinds.get(kind)))
    inputs = {k: v for k, v in pm.batch(kind, mask="ones").items() if k != "labels"}
    if kind == "whisper":
        inputs["decoder_input_ids"] = torch.full((2, 1), 2)
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, **cache))


@pytest.mark.parametrize("kind", pm.DECODERS)
def test_left_padding_equals_single_examples(kind):
    """HF peft counts positions through the padding; here a padded row is what it is alone."""
    model = pm.move(prefixed(kind))
    inputs = pm.batch(kind, mask="left")
    alone = {"input_ids": inputs["input_ids"][-1:, 2:]}
    torch.testing.assert_close(pm.logits(model, inputs)[-1, 2:], pm.logits(model, alone)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5", "bart", "whisper"])
def test_gradient_checkpointing(kind, projection, reentrant):
    """HF peft refuses it: a checkpointed layer gets no cache."""
    model = prefixed(kind, prefix_projection=projection).train()
    inputs = pm.batch(kind, mask="right")
    y, _ = pm.backward(model, inputs)
    grads = [p.grad.clone() for p in peftk.trainable_parameters(model) if p.grad is not None]
    if pm.is_4() and kind == "bart" and reentrant:
        pytest.skip(
            "transformers 4's enable_input_require_grads does not reach BART's embeddings: whatever is trained gets nothing"
        )
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, _ = pm.backward(model, inputs)
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-5)
    after = [p.grad for p in peftk.trainable_parameters(model) if p.grad is not None]
    assert len(grads) == len(after) > 0
    for a, b in zip(after, grads, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("base", ["nf4", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_on_other_bases(kind, base):
    model = pm.move(prefixed(kind, base))
    inputs = pm.batch(kind, mask="right")
    y, _ = pm.backward(model, inputs)
    assert all(p.dtype == torch.float32 for p in peftk.trainable_parameters(model))
    assert gradient(model).abs().max() > 0 and y.dtype == (torch.bfloat16 if base == "bf16" else torch.float32)
    generated = model.generate(**inputs | {"labels": None}, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(**inputs | {"labels": None}, max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "whisper"])
def test_disabled_and_detached_are_the_original(kind):
    model, inputs = pm.build(kind), pm.batch(kind)
    before, y = tiny.state_of(model), pm.logits(model, inputs)
    pm.move(attach(model, PrefixTuningConfig(num_virtual_tokens=N, task_type=pm.MODELS[kind][1])))
    assert not torch.allclose(pm.logits(model, inputs), y, atol=1e-3)
    with peftk.disable_adapters(model):
        assert torch.equal(pm.logits(model, inputs), y)
    peftk.detach(model)
    tiny.assert_same_state(before, tiny.state_of(model))
    assert torch.equal(pm.logits(model, inputs), y)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_several_prefixes_stand_one_behind_the_other():
    model, inputs = pm.build("llama"), pm.batch("llama")
    pm.move(attach(model, PrefixTuningConfig(num_virtual_tokens=2), "shared"), seed=1)
    pm.move(attach(model, PrefixTuningConfig(num_virtual_tokens=3), "own"), seed=2)
    peftk.set_adapter(model, ["shared", "own"])
    one = attach(pm.build("llama"), PrefixTuningConfig(num_virtual_tokens=5))
    both = [encoder(model, name).flat()["prompt_embeddings"] for name in ("shared", "own")]
    encoder(one).load_flat({"prompt_embeddings": torch.cat(both)})
    assert torch.equal(pm.logits(one, inputs), pm.logits(model, inputs))
    pm.backward(model, inputs)
    assert all(p.grad is not None for p in peftk.trainable_parameters(model)) and len(peftk.trainable_parameters(model)) == 4
    with pytest.raises(ValueError, match="adapter_names: expected adapters of weights, got shared, own"):
        peftk.merge(model)


def test_copies_and_pickles_are_independent():
    model, inputs = pm.move(prefixed("gpt2")), pm.batch("gpt2")
    y = pm.logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(pm.logits(twin, inputs), y)
        pm.move(twin, seed=9)
        assert torch.equal(pm.logits(model, inputs), y) and not torch.equal(pm.logits(twin, inputs), y)
        peftk.detach(twin)
        assert not any(m._forward_pre_hooks for m in twin.modules())


@pytest.mark.parametrize("kind", pm.SEQ2SEQ)
@pytest.mark.parametrize("kinds", [["encoder"], ["self"], ["cross"], ["encoder", "self", "cross"]], ids="+".join)
def test_a_prefix_of_its_own_for_each_kind(kind, kinds):
    model = prefixed(kind, attentions=kinds, prefix_projection=True)
    inputs = pm.batch(kind, mask=None if kind == "whisper" else "right")
    y, _ = pm.backward(model, inputs)
    assert set(encoder(model).prefixes) == set(kinds)
    for name, parameter in encoder(model).named_parameters():
        assert parameter.grad is not None, name
    assert len(encoder(model).index) == 2 * len(kinds), "no two layers share"
    with peftk.disable_adapters(model):
        assert not torch.allclose(pm.logits(model, inputs), y, atol=1e-3)


def test_dropout_falls_on_keys_and_values_in_training_only():
    model, inputs = prefixed("gpt2", prefix_dropout=0.5), pm.batch("gpt2")
    y = pm.logits(model, inputs)
    assert torch.equal(pm.logits(model, inputs), y)
    pair = model.train().deep_prompts.prompt_embeddings["default"].pair(0)
    kept = pair != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(pair[kept], 2 * encoder(model).prefixes["self"].pairs[0][kept])


def infixed(kind: str, **fields) -> torch.nn.Module:
    return pm.move(prefixed(kind, variant="infix", infix_token_id=60, **fields))


@pytest.mark.parametrize("kind", pm.DECODERS)
def test_an_infix_is_seen_behind_its_token_only(kind):
    model, inputs = infixed(kind), pm.batch(kind, mask="left")
    inputs["input_ids"][0, 3] = inputs["input_ids"][1, 4] = 60
    if pm.is_4() and kind == "gpt2":
        with pytest.raises(
            ValueError, match=r"hands keywords on to its attention, but GPT2Attention of transformers 4\.\d+\.\d+ got"
        ):
            pm.logits(model, inputs)
        return
    y = pm.logits(model, inputs)
    with peftk.disable_adapters(model):
        base = pm.logits(model, inputs)
    torch.testing.assert_close(y[0, :4], base[0, :4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y[0, 4:], base[0, 4:], atol=1e-2)
    alone = pm.logits(model, {"input_ids": inputs["input_ids"][1:, 2:]})
    torch.testing.assert_close(y[1, 2:], alone[0], rtol=1e-4, atol=1e-5)
    for reentrant in (False, True):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again, _ = pm.backward(model, inputs)
        torch.testing.assert_close(again[:, 2:], y[:, 2:], rtol=1e-4, atol=1e-4)
    model.eval().gradient_checkpointing_disable()
    ids = inputs["input_ids"][:1, :4]
    with_cache = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(with_cache, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False))


def test_vectors_at_the_input_only():
    for projection in (False, True):
        model = prefixed("gpt2", variant="embedding", prefix_projection=projection)
        prompt = attach(pm.build("gpt2"), peftk.PromptTuningConfig(num_virtual_tokens=N))
        with torch.no_grad():
            made = model.input_prompts.prompt_embeddings["default"]()
            prompt.input_prompts.prompt_embeddings["default"].weight.copy_(made)
        assert torch.equal(pm.logits(model, pm.batch("gpt2")), pm.logits(prompt, pm.batch("gpt2")))
        assert len(peftk.trainable_parameters(model)) == (5 if projection else 1)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5", "bart"])
@pytest.mark.parametrize("projection", [False, True])
def test_starts_from_the_activations_of_words(kind, projection):
    """At its start the prefix does what the words in front do, in a causal model without shared layers."""
    kinds = {"attentions": ["encoder", "self", "cross"]} if kind in ("t5", "bart") else {}
    start = {"init_text": "one two three", "tokenizer": pm.words, "encoder_hidden_size": 12, **kinds}
    model = prefixed(kind, prefix_projection=projection, **start)
    again = prefixed(
        kind,
        prefix_projection=projection,
        **start | {"init_text": None, "init_token_ids": pm.words("one two three")["input_ids"]},
    )
    for key, value in encoder(model).flat().items():
        torch.testing.assert_close(value, encoder(again).flat()[key], rtol=1e-3, atol=1e-3)
    if kind in pm.DECODERS:
        inputs = pm.batch(kind)
        ids = torch.tensor([pm.words("one two three")["input_ids"]] * 2)
        base = pm.logits(pm.build(kind), {"input_ids": torch.cat([ids, inputs["input_ids"]], 1)})
        torch.testing.assert_close(pm.logits(model, inputs), base[:, N:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("projection", [False, True])
def test_zero_start(projection):
    model = prefixed("gpt2", init_weights="zero", prefix_projection=projection)
    assert not encoder(model).flat()["prompt_embeddings"].any()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_files_both_ways(kind, projection, tmp_path):
    if kind == "bert":
        pm.skip_where_peer_loses_the_cache()
    ours = pm.move(prefixed(kind, prefix_projection=projection), 0.1)
    inputs = pm.batch(kind)
    y = pm.logits(ours, inputs)
    peftk.save_adapter(ours, tmp_path / "ours")
    with_hf = peft.PeftModel.from_pretrained(pm.build(kind), tmp_path / "ours")
    torch.testing.assert_close(pm.logits(with_hf, inputs), y)
    with_hf.save_pretrained(tmp_path / "hf")
    for folder in ("ours", "hf"):
        loaded = peftk.load_adapter(pm.build(kind), tmp_path / folder)
        torch.testing.assert_close(pm.logits(loaded, inputs), y)
        assert not peftk.trainable_parameters(loaded) and encoder(loaded).is_plain
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["token_dim"]) == ("PREFIX_TUNING", 24 if kind == "llama" else 32)


def test_training_goes_on_from_files_exactly(tmp_path):
    ours = pm.move(prefixed("gpt2", prefix_projection=True, encoder_hidden_size=12, prefix_dropout=0.2), 0.1)
    peftk.save_adapter(ours, tmp_path / "a")
    twin = peftk.load_adapter(pm.build("gpt2"), tmp_path / "a", is_trainable=True)
    for model in (ours.train(), twin.train()):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(**pm.batch("gpt2")).loss.backward()
            optimizer.step()
    for a, b in zip(peftk.trainable_parameters(ours), peftk.trainable_parameters(twin), strict=True):
        assert torch.equal(a, b)
    other = pm.move(prefixed("gpt2", prefix_projection=True, encoder_hidden_size=12), 0.1, seed=8)
    peftk.save_adapter(other, tmp_path / "b")
    (tmp_path / "b" / "peftk_encoder.safetensors").replace(tmp_path / "a" / "peftk_encoder.safetensors")
    with pytest.raises(ValueError, match="a/adapter_model.safetensors: prompt_embeddings: expected what the encoder makes"):
        peftk.load_adapter(pm.build("gpt2"), tmp_path / "a", is_trainable=True)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("t5", {"attentions": ["encoder", "self", "cross"]}),
        ("llama", {"variant": "infix", "infix_token_id": 60}),
        ("gpt2", {"variant": "embedding", "prefix_projection": True}),
    ],
    ids=["kinds", "infix", "embedding"],
)
def test_what_hf_cannot_represent_it_refuses(kind, fields, tmp_path):
    ours = pm.move(prefixed(kind, **fields), 0.1)
    inputs = pm.batch(kind)
    inputs["input_ids"][:, 2] = 60
    peftk.save_adapter(ours, tmp_path / "a")
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(pm.build(kind), tmp_path / "a")
    loaded = peftk.load_adapter(pm.build(kind), tmp_path / "a")
    torch.testing.assert_close(pm.logits(loaded, inputs), pm.logits(ours, inputs))


def test_bad_arguments_are_named_and_nothing_is_attached():
    bad = [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: expected a positive integer, got 0"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size: expected a positive"),
        ({"init_weights": "one"}, "init_weights: expected None"),
        ({"prefix_dropout": 1.0}, "prefix_dropout: expected a probability"),
        ({"attentions": ["all"]}, "attentions: expected None or some of"),
        ({"variant": "suffix"}, "variant: expected one of"),
        ({"variant": "infix"}, "infix_token_id: expected a token id for an infix"),
        ({"init_text": "x"}, "tokenizer: expected one"),
    ]
    for fields, message in bad:
        with pytest.raises(ValueError, match=message):
            PrefixTuningConfig(**{"num_virtual_tokens": N} | fields)
    wrong = [
        (
            "gpt2",
            {"attentions": ["cross"]},
            "attentions: expected kinds that the model has, got 'cross', which GPT2LMHeadModel lacks",
        ),
        ("gpt2", {"num_virtual_tokens": 32}, "num_virtual_tokens: expected fewer than the model's 32 positions"),
        ("llama", {"token_dim": 32}, "token_dim: expected 24, as the model has it, got 32"),
        ("llama", {"num_layers": 3}, "num_layers: expected 2"),
        ("t5", {"variant": "infix", "infix_token_id": 3}, "variant: expected a prefix for an encoder-decoder model"),
        ("gpt2", {"init_token_ids": [61]}, "init_token_ids: expected ids below 61"),
        ("gpt2", {"modules_to_save": ["nothing"]}, "modules_to_save: expected names of modules"),
        ("whisper", {"attentions": ["cross"], "init_token_ids": [5]}, "init_text: expected a model whose stacks take token ids"),
    ]
    for kind, fields, message in wrong:
        model = pm.build(kind)
        before = tiny.state_of(model)
        with pytest.raises(ValueError, match=message):
            attach(model, PrefixTuningConfig(**{"num_virtual_tokens": N} | fields))
        tiny.assert_same_state(before, tiny.state_of(model))
        assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="model: expected one whose attention .*got a Net without attention"):
        attach(tiny.Net(), PrefixTuningConfig(num_virtual_tokens=N))
    layer = torch.nn.TransformerEncoderLayer(16, 2)
    with pytest.raises(ValueError, match="got attention that peftk doesn't know .MultiheadAttention"):
        attach(layer, PrefixTuningConfig(num_virtual_tokens=N))
    model = prefixed("gpt2", num_virtual_tokens=20)
    with pytest.raises(ValueError, match="num_virtual_tokens: expected at most 32 positions .*got 40, of which 20"):
        model(input_ids=torch.ones(1, 20, dtype=torch.long))
    model = infixed("gpt2")
    with pytest.raises(ValueError, match="input_ids: expected the token 60, .* in row 0"):
        model(input_ids=torch.ones(1, 5, dtype=torch.long))
    attach(model, PrefixTuningConfig(num_virtual_tokens=2), "other")
    with pytest.raises(ValueError, match="names: expected prefixes, got default, other: an infix can't be combined"):
        peftk.set_adapter(model, ["default", "other"])
