"""P-Tuning v2: prefix and head against HF peft, several tasks, files with heads."""

from __future__ import annotations

import copy
import json

import prompt_models as pm
import pytest
import torch

import peftk
from peftk import PTuningV2Config, attach

peft = pytest.importorskip("peft")
N = 3


def tuned(kind: str, name: str = "default", **fields) -> torch.nn.Module:
    return attach(pm.build(kind), PTuningV2Config(num_virtual_tokens=N, **fields), name)


@pytest.mark.parametrize("kind", ["bert", "bert-tagger", "llama-classifier"])
def test_prefix_and_head_are_trained_as_by_hf(kind):
    pm.skip_where_peer_loses_the_cache()
    base = pm.build(kind)
    theirs = pm.hf(base, peft.PrefixTuningConfig(num_virtual_tokens=N, task_type=pm.MODELS[kind][1]))
    ours = attach(base, PTuningV2Config(num_virtual_tokens=N))
    encoder = ours.deep_prompts.prompt_embeddings["default"]
    encoder.load_flat({"prompt_embeddings": theirs.prompt_encoder["default"].embedding.weight})
    inputs = pm.batch(kind, mask="ones")
    assert torch.equal(pm.backward(ours, inputs)[0], pm.backward(theirs, inputs)[0])
    expected = {n.split(".")[-1]: p.grad for n, p in theirs.named_parameters() if p.requires_grad and "modules_to_save" in n}
    found = {n.split(".")[-1]: p.grad for n, p in ours.named_parameters() if p.requires_grad and "modules_to_save" in n}
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    assert not any("hidden" in n for n, p in ours.named_parameters() if p.requires_grad and "deep" in n), "no MLP by default"


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["bert", "bert-tagger", "llama-classifier"])
def test_files_both_ways_with_heads(kind, projection, tmp_path):
    pm.skip_where_peer_loses_the_cache()
    ours, inputs = pm.move(tuned(kind, prefix_projection=projection), 0.1), pm.batch(kind)
    y = pm.logits(ours, inputs)
    peftk.save_adapter(ours, tmp_path / "ours")
    with_hf = peft.PeftModel.from_pretrained(pm.build(kind), tmp_path / "ours")
    torch.testing.assert_close(pm.logits(with_hf, inputs), y)
    with_hf.save_pretrained(tmp_path / "hf")
    for folder in ("ours", "hf"):
        torch.testing.assert_close(pm.logits(peftk.load_adapter(pm.build(kind), tmp_path / folder), inputs), y)
    resumed = peftk.load_adapter(pm.build(kind), tmp_path / "ours", is_trainable=True)
    assert len(peftk.trainable_parameters(resumed)) == len(peftk.trainable_parameters(ours))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BartModel", "BartForSequenceClassification", "GPT2Model"])
def test_only_tasks_of_hf_pefts_are_written_for_it(name, tmp_path):
    """It needs a task to put prompts in place at all, and of encoder-decoder models knows one."""
    transformers = pytest.importorskip("transformers")
    config = pm.build("bert" if "Bert" in name else "gpt2" if "GPT2" in name else "bart").config
    model = getattr(transformers, name)(config).eval()
    twin = copy.deepcopy(model)
    head = ["classification_head"] if "Classification" in name else None
    pm.move(attach(model, PTuningV2Config(num_virtual_tokens=N, modules_to_save=head)))
    peftk.save_adapter(model, tmp_path / "a")
    found = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"]
    assert found == ("PREFIX_TUNING" if name == "GPT2Model" else "PEFTK_PREFIX_TUNING")
    ids = torch.tensor([[5, 6, 2]])
    peftk.load_adapter(twin, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(twin(input_ids=ids)[0], model(input_ids=ids)[0])


def test_tasks_share_a_prefix_and_have_their_own():
    model = tuned("bert", "shared")
    attach(model, PTuningV2Config(num_virtual_tokens=2), "task")
    pm.move(model)
    peftk.set_adapter(model, ["shared", "task"])
    inputs = pm.batch("bert")
    both = pm.logits(model, inputs)
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.deep_prompts.parameters())
    grads = {n.split(".")[-2]: p.grad for n, p in model.classifier.named_parameters() if "modules_to_save" in n}
    assert grads["task"] is not None and grads["shared"] is None, "of several heads the last one speaks"
    peftk.set_adapter(model, "shared")
    assert not torch.allclose(pm.logits(model, inputs), both, atol=1e-3)


@pytest.mark.parametrize("first", ["prefix", "lora"])
def test_beside_lora_in_either_order(first):
    """A prefix replaces no module: LoRA's targets are found in the attention that it acts on, before or after."""
    model, inputs = pm.build("llama"), pm.batch("llama")
    configs = {"prefix": PTuningV2Config(num_virtual_tokens=N), "lora": peftk.LoraConfig(target_modules=["k_proj", "v_proj"])}
    for name in (first, *(name for name in configs if name != first)):
        pm.move(attach(model, configs[name], name), 0.3, seed=len(name))
    peftk.set_adapter(model, ["lora", "prefix"])
    both = pm.logits(model, inputs)
    pm.backward(model, inputs)
    assert all(p.grad is not None for p in peftk.trainable_parameters(model))
    peftk.merge(model, "lora")
    torch.testing.assert_close(pm.logits(model, inputs), both, rtol=1e-4, atol=1e-4)
    peftk.unmerge(model)
    peftk.delete_adapter(model, "prefix")
    assert not torch.allclose(pm.logits(model, inputs), both, atol=1e-2) and "lora" in model._peftk_adapters.active


def test_it_learns_what_the_frozen_base_cannot():
    """Labels by a token's presence: the loss falls far below chance within a few steps, the base's bytes stay."""
    model = tuned("bert")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    ids = torch.randint(5, 61, (24, 7), generator=torch.Generator().manual_seed(2))
    labels = torch.arange(24) % 3
    ids[torch.arange(24), 3] = labels + 2
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), 0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8 and losses[-1] < 0.3, losses[-1]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="variant: expected \"prefix\", got 'infix'"):
        PTuningV2Config(num_virtual_tokens=N, variant="infix", infix_token_id=3)
    model = pm.build("gpt2")
    names = [name for name, _ in copy.deepcopy(model).named_modules()]
    with pytest.raises(ValueError, match="task_type: expected a model with a head called classifier or score for TOKEN_CLS"):
        attach(model, PTuningV2Config(num_virtual_tokens=N, task_type="TOKEN_CLS"))
    assert [name for name, _ in model.named_modules()] == names
