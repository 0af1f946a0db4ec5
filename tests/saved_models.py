"""Tiny models in folders, as transformers writes them, and processes that measure a load."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tiny_models import gpt2, llama, t5
from torch import nn

IS_4 = transformers.__version__.startswith("4.")


def wide_llama() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.1))


MODELS = {"llama": llama, "llama-tied": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2, "t5": t5}
MODELS["llama-64"] = wide_llama  # whole blocks a row: bitsandbytes decodes no others right


def saved(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **kwargs) -> Path:
    """The folder of a model whose rows have each their own scale."""
    torch.manual_seed(3)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p *= torch.rand(len(p), 1) + 0.1
    model.to(dtype).save_pretrained(folder, **kwargs)
    return folder


def auto_class(name: str) -> type:
    return transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM


def inputs(name: str = "llama") -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if name == "t5" else {})


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit, under the same names."""
    left, right = a.state_dict(), b.state_dict()
    assert sorted(left) == sorted(right)
    assert [k for k in left if left[k].dtype != right[k].dtype or not torch.equal(left[k], right[k])] == []
