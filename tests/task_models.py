"""Small random models of the families that the tasks need, as folders, and records that they can learn."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

ANIMALS = "bird fish dog cat horse".split()
PLANTS = "tree grass moss oak fern".split()
OTHERS = "a small large old green that lives near the water".split()
ENCODER = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODERS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


def word_tokenizer(padding: bool = False):
    """A word a token, [CLS] in front and [SEP] behind; ``padding``: as sentence-transformers leaves it in a file."""
    import tokenizers
    import transformers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *ANIMALS, *PLANTS, *OTHERS, ".", "un", "##fish"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    if padding:
        backend.enable_padding(length=20)
        backend.enable_truncation(20)
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **named)


def bert_folder(folder: Path) -> Path:
    """A BertModel, with no head."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**ENCODER, max_position_embeddings=40, initializer_range=0.1, pad_token_id=0)
    transformers.BertModel(config).save_pretrained(folder)
    word_tokenizer(padding=True).save_pretrained(folder)
    return folder


def t5_folder(folder: Path, tokenizer) -> Path:
    """Text to text, with the byte-level tokenizer."""
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 1, "eos_token_id": 1}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, vocab_size=len(tokenizer), **ends))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_whisper(vocabulary: int):
    """Hears one second."""
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "vocab_size": vocabulary}
    ends = {"decoder_start_token_id": 0, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 1}
    facts = {"max_source_positions": 50, "max_target_positions": 48, "suppress_tokens": None, "begin_suppress_tokens": None}
    config = transformers.WhisperConfig(**sizes, **DECODERS, **ends, **facts, init_std=0.2)
    return transformers.WhisperForConditionalGeneration(config)


def whisper_folder(folder: Path, tokenizer) -> Path:
    """Speech to text, in HF's format."""
    small_whisper(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_wave(path: Path, samples: np.ndarray, rate: int = 8000, width: int = 2, channels: int = 1) -> Path:
    """PCM of samples in [-1, 1], (n,) or (n, channels)."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            file.writeframes((np.asarray(samples) * 127 + 128).astype(np.uint8).tobytes())
        else:
            whole = (np.asarray(samples) * (2**31 - 2**8)).astype("<i4").reshape(-1).view(np.uint8).reshape(-1, 4)
            file.writeframes(np.ascontiguousarray(whole[:, 4 - width :]).tobytes())
    return path


def tone(hertz: float, seconds: float = 0.5, rate: int = 8000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def phrases(count: int) -> list[list[str]]:
    """Words, one of them an animal or a plant."""
    generator = torch.Generator().manual_seed(4)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    return [[pick(OTHERS), pick(ANIMALS if i % 2 else PLANTS), pick(OTHERS), pick(OTHERS), "."] for i in range(count)]


def records(task: str, folder: Path, count: int = 60) -> Path:
    """A file for the task: the class is the kind of the word, the answer to a phrase is that word."""
    lines = []
    for i, words in enumerate(phrases(count)):
        kind = "animal" if i % 2 else "plant"
        if task == "classification":
            lines.append({"text": " ".join(words), "label": kind})
        elif task == "token-classification":
            lines.append({"tokens": words, "tags": ["O", kind.upper(), "O", "O", "O"]})
        elif task == "seq2seq":
            lines.append({"source": " ".join(words), "target": "the" if i % 2 else "that"})
        else:
            write_wave(folder / f"{i}.wav", tone(300 if i % 2 else 1200, 0.2 + 0.01 * i))
            lines.append({"audio": f"{i}.wav", "target": "the" if i % 2 else "that"})
    path = folder / f"{task}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="session")
def task_folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """By task ("audio" for recordings), the model."""
    where = tmp_path_factory.mktemp("tasks")
    bert = bert_folder(where / "bert")
    t5, whisper = t5_folder(where / "t5", tokenizer), whisper_folder(where / "whisper", tokenizer)
    return {"classification": bert, "token-classification": bert, "seq2seq": t5, "audio": whisper}
