"""A small random Llama with a tokenizer of its own, as a folder in HF's format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The model is so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WORDS = "the of and to a in that he was it his her with as had she for not but at on".split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentences(count: int, seed: int = 0) -> str:
    """Words with a pattern that a small model can learn."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (count, 4), generator=generator).tolist()
    return "\n".join(" ".join(WORDS[i] for i in line) + f" {WORDS[line[0]]}." for line in picks)


def small_tokenizer():
    """Byte-level BPE with 300 tokens, <|im_end|> as end of text."""
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([sentences(100)], trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def tokenizer():
    """The same for every test."""
    return small_tokenizer()


def small_llama(vocabulary: int):
    """2 layers, d = 64, tied head; random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,  # a padding row of the embedding is zero, and the tied head could never say it
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def fresh_model(tokenizer):
    """Makes the small Llama, the same each time."""
    return lambda: small_llama(len(tokenizer)).eval()


@pytest.fixture
def model(fresh_model):
    """The small Llama, in memory."""
    return fresh_model()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    """The small Llama, on disk."""
    folder = tmp_path_factory.mktemp("model")
    small_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path) -> Path:
    """About 3000 tokens of text."""
    path = tmp_path / "text.txt"
    path.write_text(sentences(220))
    return path
