from __future__ import annotations

import json

import pytest
from torch import nn

import peftk
from peftk.cli import generate, main
from peftk.cli.prepare import for_generation


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    """An adapter that answers anything with the same words."""
    folder = tmp_path_factory.mktemp("generate")
    lines = [json.dumps({"prompt": f"{i} to be", "completion": " or not to be"}) for i in range(60)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    flags = f"--model {model_folder} --data {folder / 'data.jsonl'} --out {folder / 'out'} --lr 1e-2 --r 8 --seq-len 64"
    assert main(["finetune", *flags.split(), "--steps", "60", "--dtype", "fp32", "--eval-fraction", "0.1"]) == 0
    return folder / "out"


def say(capsys, *flags) -> str:
    assert main(["generate", "--max-new-tokens", "12", *map(str, flags)]) == 0
    return capsys.readouterr().out.rstrip("\n")


def test_the_adapter_speaks_and_stops(adapter, capsys):
    """Model, method and dtype come from the run."""
    assert say(capsys, "--adapter", adapter, "--prompt", "7 to be", "--greedy") == "7 to be or not to be"


def test_the_base_is_quantised_as_it_was(adapter, capsys, monkeypatch):
    seen = []
    inner = generate.prepare_base
    monkeypatch.setattr(generate, "prepare_base", lambda model, *facts: seen.append(facts) or inner(model, *facts))
    say(capsys, "--adapter", adapter, "--prompt", "7")
    say(capsys, "--adapter", adapter, "--prompt", "7", "--base", "dense", "--dtype", "bf16")
    assert [(base, str(dtype)) for base, dtype, *_ in seen] == [("nf4", "torch.float32"), ("dense", "torch.bfloat16")]


def test_without_an_adapter_the_base_speaks(model_folder, adapter, capsys):
    plain = say(capsys, "--model", model_folder, "--prompt", "7 to be", "--greedy")
    assert plain.startswith("7 to be") and plain != "7 to be or not to be"


@pytest.mark.parametrize(("head", "kind"), [("dense", peftk.nn.DenseLinear), ("nf4", peftk.nn.NF4Linear)])
def test_the_head_is_as_asked(head, kind, model_folder, capsys, monkeypatch):
    seen, inner = [], generate.for_generation
    monkeypatch.setattr(generate, "for_generation", lambda *given: seen.append(inner(*given)) or seen[-1])
    say(capsys, "--model", model_folder, "--prompt", "7", "--head", head)
    model = seen[0]
    assert type(model.get_output_embeddings()) is kind and not model.training
    assert model.get_input_embeddings().weight.is_floating_point()


def test_a_head_that_is_none_is_told():
    model = nn.Module()
    model.get_output_embeddings = lambda: None
    assert not for_generation(model).training
    with pytest.raises(ValueError, match="head: expected a model that makes logits with an nn.Linear, got one with NoneType"):
        for_generation(model, "nf4")


def test_the_seed_decides_what_is_drawn(model_folder, capsys):
    texts = [say(capsys, "--model", model_folder, "--prompt", "the", "--temperature", 2, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_prints_the_answer_alone(model_folder, capsys):
    assert "user" not in say(capsys, "--model", model_folder, "--prompt", "the man", "--chat", "--greedy")[:20]


def test_what_is_no_adapter_is_told(model_folder, tmp_path, capsys):
    cases = {
        ("--prompt", "x"): "--model is needed",
        ("--prompt", "x", "--adapter", tmp_path / "none"): "none: no such folder",
        ("--prompt", "x", "--adapter", tmp_path): "holds no adapter_config.json",
        ("--prompt", "", "--model", model_folder): "--prompt: expected at least one token",
    }
    for flags, message in cases.items():
        assert main(["generate", *map(str, flags)]) == 2
        assert message in capsys.readouterr().err


def test_an_adapter_for_another_model_is_told(adapter, model_folder, tmp_path, capsys):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    assert main(["generate", "--adapter", str(tmp_path), "--prompt", "x"]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
