"""transformers' own Trainer on a model from NF4Config, with peftk.attach and with HF peft: what it saves, exact resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftk

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from saved_models import inputs, saved  # noqa: E402

from peftk.integrations.transformers import AdaLoraCallback, NF4Config, save_adapters_only  # noqa: E402
from peftk.methods.attach import find_attached  # noqa: E402

STEPS, SAVED = 4, 2
IDS = torch.randint(0, 61, (24, 12), generator=torch.Generator().manual_seed(5))
DATA = [{"input_ids": ids, "labels": ids} for ids in IDS]
CONFIGS = {
    "lora": lambda: peftk.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", modules_to_save=["lm_head"]),
    "pissa": lambda: peftk.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa", use_rslora=True),
    "dora": lambda: peftk.LoraConfig(r=2, target_modules=["v_proj"], use_dora=True),
    "ptuning": lambda: peftk.PTuningConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "prefix": lambda: peftk.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "adalora": lambda: peftk.AdaLoraConfig(init_r=4, target_r=2, tfinal=1, total_step=99, target_modules=["q_proj", "up_proj"]),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


def base(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=NF4Config())


def adapted(folder: Path, kind: str = "lora", name: str = "default", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return peftk.attach(base(folder, dtype), CONFIGS[kind](), name)


def trainer(model: torch.nn.Module, out: Path, **arguments) -> transformers.Trainer:
    facts = {"max_steps": STEPS, "save_steps": SAVED, "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(str(out), per_device_train_batch_size=3, disable_tqdm=True, **(facts | arguments))
    configs = getattr(find_attached(model), "configs", {}).values()
    callbacks = [AdaLoraCallback()] if any(isinstance(config, peftk.AdaLoraConfig) for config in configs) else []
    return transformers.Trainer(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=callbacks)


def losses(trainer: transformers.Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_same_training(a: transformers.Trainer, b: transformers.Trainer) -> None:
    """Every loss, parameter and optimizer state, bit for bit."""
    assert losses(a) == losses(b) and len(losses(a)) == STEPS
    theirs = dict(b.model.named_parameters())
    assert [name for name, p in a.model.named_parameters() if not torch.equal(p, theirs[name])] == []
    left, right = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    assert left.keys() == right.keys()
    assert all(torch.equal(left[i][k], right[i][k]) for i in left for k in left[i])


@pytest.mark.parametrize("kind", CONFIGS)
def test_resumes_exactly_from_adapters_only(tmp_path: Path, folder: Path, kind: str, caplog: pytest.LogCaptureFixture):
    whole = trainer(adapted(folder, kind), tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{SAVED}"
    names = {path.name for path in checkpoint.iterdir()}
    files = {"adapter_config.json", "adapter_model.safetensors"}
    assert files & names == (set() if kind == "pissa" else files)
    assert ("has no adapter_model.safetensors, and training goes on" in caplog.text) == (kind == "pissa")
    assert {"optimizer.pt", "rng_state.pth"} <= names
    assert not {"model.safetensors", "config.json"} & names
    held = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    trained = {name for name, p in whole.model.named_parameters() if p.requires_grad}
    assert set(held) == trained | {"peftk_adapters_only"} | ({"peftk_adalora"} if kind == "adalora" else set())

    resumed = trainer(adapted(folder, kind), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_training(whole, resumed)
    assert "missing keys" not in caplog.text


def schedule_of(trainer: transformers.Trainer) -> Any:
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, AdaLoraCallback))
    return callback.schedules["default"]


def test_adalora_resumes_exactly(tmp_path: Path, folder: Path):
    """From before the first pruning, between two, and after the last one, where the pruned triplets are gone."""
    whole = trainer(adapted(folder, "adalora"), tmp_path / "whole", save_steps=1)
    whole.train()
    schedule = schedule_of(whole)
    ranks = schedule.allocator.ranks()
    assert schedule.step == STEPS and schedule.allocator.is_final
    assert sum(ranks.values()) == 8 and [step for step, _ in schedule.history] == [0, 1, 2]
    E = {name: p for name, p in whole.model.named_parameters() if "lora_E" in name}
    assert sum(len(p) for p in E.values()) == 8
    for step in (1, 2, 3):
        resumed = trainer(adapted(folder, "adalora"), tmp_path / "resumed", save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same_training(whole, resumed)
        assert schedule_of(resumed).history == schedule.history
    read = peftk.load_adapter(base(folder), tmp_path / "whole" / f"checkpoint-{STEPS}").eval()
    assert torch.equal(read(**inputs()).logits, whole.model.eval()(**inputs()).logits)


def test_adaloras_best_model_comes_back_with_all_its_triplets(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture):
    facts = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    ours = trainer(adapted(folder, "adalora"), tmp_path, learning_rate=3.0, **facts)
    ours.train()
    best = min(row["eval_loss"] for row in ours.state.log_history if "eval_loss" in row)
    assert ours.state.best_global_step < 3, "the last pruning"
    assert ours.evaluate()["eval_loss"] == best
    before = schedule_of(ours).step
    ours.train()  # on what came back, with an optimizer that knew fewer triplets; the first schedule has left it
    assert "optimizer: states for another number of triplets are dropped" in caplog.text
    assert before == 1 and schedule_of(ours).step == before + ours.state.best_global_step


def test_adaloras_callback_refuses(tmp_path: Path, folder: Path):
    ours = trainer(adapted(folder), tmp_path, save_strategy="no")
    ours.add_callback(AdaLoraCallback())
    with pytest.raises(ValueError, match="model: expected one with AdaLoRA adapters, got one with default"):
        ours.train()
    short = trainer(adapted(folder, "adalora"), tmp_path, max_steps=1, save_strategy="no")
    with pytest.raises(ValueError, match="tinit: expected an integer from 0 to below total_step - tfinal"):
        short.train()


def test_several_adapters(tmp_path: Path, folder: Path):
    """Each in the folder that HF peft gives it; all are back after a resumption."""

    def model() -> torch.nn.Module:
        first = adapted(folder, "lora")
        return peftk.attach(first, CONFIGS["dora"](), "second")

    whole = trainer(model(), tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{SAVED}"
    assert (checkpoint / "adapter_config.json").exists() and (checkpoint / "second" / "adapter_model.safetensors").exists()
    resumed = trainer(model(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_training(whole, resumed)
    other = trainer(adapted(folder, "lora"), tmp_path / "other")
    with pytest.raises(ValueError, match=r"checkpoint: expected the tensors of the model's adapters.*lora_A\.second"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_saved_model_is_hf_pefts(tmp_path: Path, folder: Path):
    peft = pytest.importorskip("peft")
    ours = trainer(adapted(folder), tmp_path, save_strategy="no")
    ours.train()
    ours.save_model(str(tmp_path / "final"))
    names = sorted(path.name for path in (tmp_path / "final").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "training_args.bin"]
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    expected = ours.model.eval()(**inputs()).logits
    read = peftk.load_adapter(base(folder), tmp_path / "final").eval()
    theirs = peft.PeftModel.from_pretrained(base(folder), tmp_path / "final").eval()
    assert torch.equal(read(**inputs()).logits, expected)
    assert torch.allclose(theirs(**inputs()).logits, expected, atol=1e-5)
    peftk.merge(ours.model)
    peftk.detach(ours.model)
    ours.model.save_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(merged(**inputs()).logits, ours.model(**inputs()).logits)


def test_best_model_comes_back(tmp_path: Path, folder: Path):
    facts = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    ours = trainer(adapted(folder), tmp_path, learning_rate=3.0, **facts)  # so large a rate that the last step isn't the best
    ours.train()
    best = min(row["eval_loss"] for row in ours.state.log_history if "eval_loss" in row)
    assert ours.state.best_global_step < STEPS
    assert ours.evaluate()["eval_loss"] == best


def test_with_hf_peft(tmp_path: Path, folder: Path):
    """HF peft's wrappers around our layers: its own checkpoints, and the same exactness."""
    peft = pytest.importorskip("peft")

    def model() -> torch.nn.Module:
        config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
        return peft.get_peft_model(base(folder), config)

    whole = trainer(model(), tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{SAVED}"
    assert (checkpoint / "adapter_model.safetensors").exists() and not list(checkpoint.glob("*.bin.index.json"))
    resumed = trainer(model(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_training(whole, resumed)


def test_bf16_and_gradient_checkpointing(tmp_path: Path, folder: Path):
    model = adapted(folder, dtype=torch.bfloat16)
    facts = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "bf16": True}
    ours = trainer(model, tmp_path, save_strategy="no", **facts)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ours.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_without_adapters_it_is_refused(tmp_path: Path, folder: Path):
    with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
        trainer(base(folder), tmp_path)
    model = peftk.detach(adapted(folder))
    with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
        trainer(model, tmp_path)


def test_a_dense_model(tmp_path: Path, folder: Path):
    """One line for models that no NF4Config made."""

    def model() -> torch.nn.Module:
        torch.manual_seed(1)
        dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return peftk.attach(save_adapters_only(dense), CONFIGS["lora"]())

    whole = trainer(model(), tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{SAVED}"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    resumed = trainer(model(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_training(whole, resumed)


def test_save_pretrained_refuses(tmp_path: Path, folder: Path):
    model = adapted(folder)
    with pytest.raises(ValueError, match="push_to_hub: expected False for a model with adapters"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="Missing key"):  # strict stays strict where the file isn't one of adapters
        model.load_state_dict({})
