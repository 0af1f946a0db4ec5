from __future__ import annotations

import shutil

import pytest
import torch
from task_models import bert_folder

from peftk.cli import models
from peftk.cli.errors import UserError
from peftk.cli.models import open_for, open_model, resolve_device, resolve_dtype


def test_a_folder_opens_in_its_stored_dtype(model_folder, fresh_model, tmp_path):
    model, tokenizer = open_model(str(model_folder))
    assert not model.training and tokenizer.eos_token == "<|im_end|>"
    for name, tensor in fresh_model().state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    fresh_model().bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert open_model(str(tmp_path))[0].dtype == torch.bfloat16


def test_what_no_file_has_is_new(tmp_path):
    """A head, and a pooler where the folder has none; classes that a folder knows keep their numbers and its head."""
    transformers = pytest.importorskip("transformers")
    folder = bert_folder(tmp_path / "bert")
    opened = open_for("SEQ_CLS", str(folder), ["x", "y"])
    assert opened.new == ("classifier",) and opened.model.config.label2id == {"x": 0, "y": 1}
    assert open_for("TOKEN_CLS", str(folder), ["x", "y", "z"]).model.classifier.out_features == 3
    without = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    without.save_pretrained(folder)
    assert open_for("SEQ_CLS", str(folder), ["x", "y"]).new == ("bert.pooler.dense", "classifier")
    opened.model.config.id2label, opened.model.config.label2id = {0: "y", 1: "x"}, {"y": 0, "x": 1}
    opened.model.save_pretrained(folder)
    again = open_for("SEQ_CLS", str(folder), ["x", "y"])
    assert again.new == () and again.model.config.label2id == {"y": 0, "x": 1}
    assert torch.equal(again.model.classifier.weight, opened.model.classifier.weight)
    assert open_for("SEQ_CLS", str(folder), ["a", "b", "c"]).new == ("classifier",)


def test_a_decoder_of_another_file_gets_a_head(model_folder, monkeypatch, model, tokenizer, tmp_path):
    """As a GGUF file's model: its body stays, its own head goes."""
    path = tmp_path / "a.gguf"
    path.touch()
    monkeypatch.setattr(models, "open_gguf", lambda _: (model, tokenizer))
    opened = open_for("TOKEN_CLS", str(path), ["O", "X"])
    assert type(opened.model).__name__ == "LlamaForTokenClassification" and opened.new == ("score",)
    assert opened.model.model is model.model and opened.model.config.pad_token_id == tokenizer.eos_token_id
    with pytest.raises(UserError, match="a LlamaForCausalLM is not for --task seq2seq"):
        open_for("SEQ_2_SEQ_LM", str(path))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("no folder", "no such folder or file; expected one, or the name 'smollm2'"),
        ("config.json", "the folder has no config.json"),
        ("model.safetensors", "--model .*: "),
        ("no tokenizer", "--model .*: "),
        ("not gguf", "expected a GGUF file"),
        ("empty gguf", "expected a GGUF file"),
    ],
)
def test_what_is_no_model_is_told(model_folder, tmp_path, broken, message):
    folder = tmp_path / "model"
    if broken.endswith("gguf"):
        folder = tmp_path / "x.gguf"
        folder.write_bytes(b"GGML" + bytes(100) if broken == "not gguf" else b"")
    elif broken != "no folder":
        shutil.copytree(model_folder, folder)
        for file in folder.glob("tokenizer*") if broken == "no tokenizer" else [folder / broken]:
            file.unlink()
    with pytest.raises(UserError, match=message) as error:
        open_model(str(folder))
    assert str(folder) in str(error.value)


def test_a_tokenizer_that_does_not_fit_is_refused(model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    _, tokenizer = open_model(str(folder))
    tokenizer.add_tokens(["new", "newer"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"expected a tokenizer for the model's embedding of \d+, got one of \d+ tokens"):
        open_model(str(folder))


def test_dtype_and_device_by_name():
    cpu = torch.device("cpu")
    assert resolve_device("cpu") == cpu
    assert resolve_dtype("fp32", cpu) == torch.float32 and resolve_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(UserError, match="--device toaster"):
        resolve_device("toaster")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == cpu
        with pytest.raises(UserError, match="--device cuda: torch .* sees no CUDA device"):
            resolve_device("cuda")


@pytest.mark.parametrize(
    ("tier", "dtype"),
    [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx512", torch.float32), (None, torch.float32)],
)
def test_bf16_by_itself_only_where_the_processor_multiplies_it(monkeypatch, tier, dtype):
    class Facts:
        cpu_tier = tier

    monkeypatch.setattr(models.peftk, "info", Facts)
    assert resolve_dtype("auto", torch.device("cpu")) == dtype
