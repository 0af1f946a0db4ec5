"""Models and twins for the prompt methods: every family in tiny, and HF peft's model with equal weights."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings

import pytest
import tiny_models as tiny
import torch
from torch import nn

import peftk

SIZES = {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "init_std": 0.2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def bart() -> nn.Module:
    tf = pytest.importorskip("transformers")
    config = tf.BartConfig(**SIZES, **HEADS, **QUIET, **TOKENS, max_position_embeddings=32, forced_eos_token_id=None)
    return tf.BartForConditionalGeneration(config)


def whisper() -> nn.Module:
    tf = pytest.importorskip("transformers")
    facts = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32, "suppress_tokens": None}
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**SIZES, **HEADS, **QUIET, **TOKENS, **facts, begin_suppress_tokens=None)
    )


def wide_llama() -> nn.Module:
    """head_dim is not hidden / heads."""
    return tiny.llama(head_dim=12, pad_token_id=0, eos_token_id=None, bos_token_id=1)


def gpt2() -> nn.Module:
    model = tiny.gpt2()
    model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id = 0, None, 1
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def llama_classifier() -> nn.Module:
    tf = pytest.importorskip("transformers")
    config = wide_llama().config
    config.num_labels = 3
    return tf.LlamaForSequenceClassification(config)


def bert_tagger() -> nn.Module:
    tf = pytest.importorskip("transformers")
    return tf.BertForTokenClassification(tiny.bert().config)


MODELS = {
    "gpt2": (gpt2, "CAUSAL_LM"),
    "llama": (wide_llama, "CAUSAL_LM"),
    "bert": (tiny.bert, "SEQ_CLS"),
    "bert-tagger": (bert_tagger, "TOKEN_CLS"),
    "llama-classifier": (llama_classifier, "SEQ_CLS"),
    "t5": (tiny.t5, "SEQ_2_SEQ_LM"),
    "bart": (bart, "SEQ_2_SEQ_LM"),
    "whisper": (whisper, "SEQ_2_SEQ_LM"),
}
DECODERS = ["gpt2", "llama"]
SEQ2SEQ = ["t5", "bart", "whisper"]


@functools.cache
def _made(kind: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind][0]().eval()
    model.set_attn_implementation(attention)
    return model


def build(kind: str, attention: str = "sdpa", base: str = "dense") -> nn.Module:
    """A model of its own, in eval mode, with the same random weights each time."""
    model = copy.deepcopy(_made(kind, attention))
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    return model.bfloat16() if base == "bf16" else model


def batch(kind: str, rows: int = 2, length: int = 7, mask: str | None = None) -> dict[str, torch.Tensor]:
    """Inputs with labels; ``mask``: None, "ones", "left" or "right" (padding in the last row)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "labels": ids}
    if kind == "whisper":
        return {"input_features": torch.randn(rows, 8, 20, generator=generator), "labels": ids}
    if mask is not None:
        kept = torch.ones(rows, length, dtype=torch.long)
        if mask == "left":
            kept[-1, :2] = 0
        if mask == "right":
            kept[-1, -2:] = 0
        inputs |= {"attention_mask": kept, "input_ids": ids * kept}
    if MODELS[kind][1] == "SEQ_CLS":
        inputs["labels"] = torch.arange(rows) % 3
    if kind == "bert-tagger":
        inputs["labels"] = ids % 3
    return inputs


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def backward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(logits, loss or None), after a backward pass from a loss in which every logit has a weight of its own."""
    model.zero_grad()
    out = model(**inputs)
    y = out.logits
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), None if out.loss is None else out.loss.detach()


def move(model: nn.Module, scale: float = 0.5, seed: int = 3) -> nn.Module:
    """As after training: every trainable parameter moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peftk.trainable_parameters(model):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def hf(model: nn.Module, config) -> nn.Module:
    """HF peft's model on a copy of ``model``."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), config)


def is_4() -> bool:
    """Whether transformers is of version 4."""
    return pytest.importorskip("transformers").__version__.startswith("4.")


def skip_where_peer_loses_the_cache() -> None:
    """HF peft 0.21.2 knows the cache as past_key_values only: where transformers calls it otherwise (from 5.24), its prefixes on
    encoders are refused and its ``generate`` goes on without the prompt."""
    tf = pytest.importorskip("transformers")
    if "past_key_values" not in inspect.signature(tf.GPT2LMHeadModel.forward).parameters:
        pytest.skip(f"HF peft asks for past_key_values, which transformers {tf.__version__} calls otherwise")


def words(text: str) -> dict[str, list[int]]:
    """A tokenizer: one id a word, and two for words with a dash."""
    return {"input_ids": [3 + sum(map(ord, part)) % 50 for word in text.split() for part in word.split("-")]}
