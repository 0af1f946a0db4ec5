"""Positions further on, in the modules of every family that make them of a length."""

from __future__ import annotations

import pytest
import torch

from peftk.methods.attention import shifted
from peftk.methods.prompts import CACHE_NAMES, cache_of, parameters_of

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


@pytest.mark.parametrize("family", ["Bart", "MBart", "Pegasus", "Whisper"])
def test_a_module_that_counts_from_a_length_is_moved_on(family):
    """Whatever this transformers calls that length."""
    config = getattr(transformers, f"{family}Config")(
        **SIZES, **HEADS, **TOKENS, **({"num_mel_bins": 8} if family == "Whisper" else {})
    )
    module = getattr(transformers, f"{family}ForConditionalGeneration")(config).get_decoder().embed_positions
    given, length, *_ = parameters_of(module)
    first = torch.Size((2, 4)) if family == "Pegasus" else torch.zeros(2, 4, dtype=torch.long)
    torch.testing.assert_close(shifted(module, {given: first, length: 1}, 3), module(first, 4))
    assert not torch.equal(module(first, 4), module(first, 1))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_is_found_by_any_name(name):
    assert cache_of({"past_key_values": None, name: "kept", "use_cache": True}) == "kept"
    assert cache_of({"use_cache": True}) is None
