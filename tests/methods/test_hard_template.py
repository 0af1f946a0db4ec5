"""Hard templates and verbalisers, against log-probabilities worked out by hand: one text at a time, without padding."""

from __future__ import annotations

import prompt_models as pm
import pytest
import tiny_models as tiny
import torch

import peftk
from peftk import HardTemplate, PromptTuningConfig, PTuningConfig, Verbalizer, attach, precision_at_1
from peftk.methods.word_init import following_ids

TEXTS = ["dog", "old grey cat", "an oak"]
LABELS = {"animal": ["animal", "wild-beast"], "plant": ["plant"], "thing": ["small-thing"]}  # words with a dash have two tokens
VOCABULARY = 61


class Words:
    """A tokenizer with special tokens."""

    pad_token_id, mask_token_id, cls_token_id, sep_token_id = 0, 56, 57, 58

    def __call__(self, text: str) -> dict[str, list[int]]:
        return pm.words(text)


def ids(text: str) -> list[int]:
    return pm.words(text)["input_ids"]


def bert_for_masked_words() -> torch.nn.Module:
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return tf.BertForMaskedLM(tiny.bert().config).eval()


def said(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """(length, vocabulary), fp32 log-probabilities."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)


def by_hand(model: torch.nn.Module, text: str, word: str, score: str) -> torch.Tensor:
    """A word's score behind ``text is a kind of``."""
    before, answer = ids(f"{text} is a kind of"), ids(word)
    if score == "first":
        answer = answer[:1]
    table = said(model, before + answer)
    whole = sum(table[len(before) - 1 + i, token] for i, token in enumerate(answer))
    return whole / len(answer) if score == "mean" else whole


@pytest.mark.parametrize("score", ["mean", "sum", "first"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_of_a_causal_model_equal_those_by_hand(kind, score):
    model, tokenizer = pm.build(kind), Words()
    scores = Verbalizer(LABELS, tokenizer, score).scores(model, HardTemplate("{x} is a kind of [mask]", tokenizer), TEXTS)
    for row, text in zip(scores, TEXTS, strict=True):
        for got, words in zip(row, LABELS.values(), strict=True):
            each = torch.stack([by_hand(model, text, word, score) for word in words])
            torch.testing.assert_close(got, each.exp().sum().log(), rtol=1e-4, atol=1e-5)


def test_scores_of_a_masked_model_equal_those_by_hand():
    model, tokenizer = bert_for_masked_words(), Words()
    template = HardTemplate("[cls] a [mask] like {x} [sep]", tokenizer, is_causal=False)
    scores = Verbalizer(["animal", "small-thing"], tokenizer, "sum").scores(model, template, TEXTS)
    for row, text in zip(scores, TEXTS, strict=True):
        for got, word in zip(row, ["animal", "small-thing"], strict=True):
            answer = ids(word)
            table = said(model, [57, *ids("a"), *[56] * len(answer), *ids("like"), *ids(text), 58])
            torch.testing.assert_close(got, sum(table[2 + i, t] for i, t in enumerate(answer)), rtol=1e-4, atol=1e-5)


def test_a_batch_with_answers_is_the_models_own_training_batch():
    template = HardTemplate("{x} is a kind of [mask]", Words())
    model, answers = pm.build("llama"), [ids("animal"), ids("small-thing"), ids("plant")]
    inputs = template.inputs(TEXTS, answers)
    for row, labels, text, answer in zip(inputs["input_ids"], inputs["labels"], TEXTS, answers, strict=True):
        whole = ids(f"{text} is a kind of") + answer
        assert row.tolist()[-len(whole) :] == whole
        assert labels.tolist() == [-100] * (len(row) - len(answer)) + answer
    logits = template.answer_logits(model, inputs, k=2)
    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, -2:].flatten(), ignore_index=-100)
    torch.testing.assert_close(ours, model(**inputs).loss)


def test_words_made_soft_say_at_first_what_the_words_said():
    model, tokenizer = pm.build("llama"), Words()
    hard, verbalizer = HardTemplate("one {x} is a kind of [mask]", tokenizer), Verbalizer(LABELS, tokenizer)
    before = verbalizer.scores(model, hard, TEXTS)
    soft = hard.soften(VOCABULARY)
    assert soft.word_ids == [VOCABULARY] * 5 and hard.word_ids == [*ids("one"), *ids("is a kind of")]
    where = {"placeholder_token_id": VOCABULARY, "num_virtual_tokens": 5}
    config = PTuningConfig(encoder_reparameterization_type="NONE", init_token_ids=hard.word_ids, **where)
    attach(model, config)
    torch.testing.assert_close(verbalizer.scores(model, soft, TEXTS), before)
    pm.move(model)
    assert not torch.allclose(verbalizer.scores(model, soft, TEXTS), before, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_prompts_in_front_leave_the_answer_in_its_place(kind):
    tokenizer = Words()
    is_causal = kind == "llama"
    text = "{x} is a kind of [mask]" if is_causal else "[cls] {x} is a [mask] [sep]"
    template, verbalizer = HardTemplate(text, tokenizer, is_causal), Verbalizer(["animal", "plant"], tokenizer)
    model = pm.build("llama") if is_causal else bert_for_masked_words()
    attach(model, PromptTuningConfig(num_virtual_tokens=3))
    got = verbalizer.scores(model, template, TEXTS)
    for row, text in zip(got, TEXTS, strict=True):
        tokens = ids(f"{text} is a kind of") if is_causal else [57, *ids(f"{text} is a"), 56, 58]
        table = said(model, tokens)[-1 if is_causal else 3 + tokens.index(56)]
        torch.testing.assert_close(row, table[[ids("animal")[0], ids("plant")[0]]], rtol=1e-4, atol=1e-5)


def test_precision_at_1():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5], [0.3, 0.1]])
    assert precision_at_1(scores, torch.tensor([1, 1, 0, 0])) == 0.75
    with pytest.raises(ValueError, match=r"targets: expected an index for each row of scores, got \(3,\) for \(4, 2\)"):
        precision_at_1(scores, torch.tensor([1, 1, 0]))


def test_words_behind_others_keep_their_space():
    class Bytes(Words):
        def __call__(self, text):
            return {"input_ids": list(text.encode())}

    assert following_ids("is a", Bytes()) == list(b" is a")
    parts = PTuningConfig(template="[v]*2 {x} is a [v]", tokenizer=Bytes()).template_parts
    assert parts == [["v", 2], ["x", None], ["ids", list(b" is a")], ["v", 1]]
    assert PTuningConfig(template="an {x} [v]", tokenizer=Bytes()).template_parts[0] == ["ids", list(b"an")]
    made = HardTemplate("an {x} is [mask]", Bytes()).inputs(["oak"], [[1]])
    assert bytes(made["input_ids"][0].tolist()) == b"an oak is\x01"

    class Joins(Words):
        def __call__(self, text):
            return {"input_ids": [len(text)]}

    with pytest.raises(ValueError, match="tokenizer: expected tokens of 'is' of their own behind another word"):
        following_ids("is", Joins())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardTemplate("{x} [v] [mask]", Words()), r"template: expected words only, got '{x} \[v\] \[mask\]'"),
        (lambda: HardTemplate("{x} is", Words()), r"template: expected one {x} and one \[mask\], got '{x} is'"),
        (lambda: HardTemplate("is [mask]", Words()), r"template: expected one {x} and one \[mask\]"),
        (lambda: HardTemplate("{x} [mask] too", Words()), r"template: expected \[mask\] at the end for a causal model"),
        (
            lambda: HardTemplate("[cls] {x} [mask]", pm.words, False),
            "template: expected a tokenizer with a cls token, got function",
        ),
        (lambda: Verbalizer(["a", "b"], Words(), "best"), "score: expected one of mean, sum, first, got 'best'"),
        (lambda: Verbalizer(["a"], Words()), r"labels: expected at least two, each with words, got \['a'\]"),
        (lambda: Verbalizer({"a": ["a"], "b": []}, Words()), "labels: expected at least two, each with words"),
        (lambda: Verbalizer(["wild-dog", "wild-cat"], Words(), "first"), "first tokens for score='first', got 'wild-dog' and"),
        (lambda: Verbalizer(["a", "b"], Words()).answer("c"), "label: expected one of a, b, got 'c'"),
        (lambda: HardTemplate("{x} [mask]", Words()).inputs([]), r"texts: expected a list of some, got \[\]"),
        (lambda: HardTemplate("{x} [mask]", Words()).inputs("dog"), "texts: expected a list of some, got 'dog'"),
        (lambda: HardTemplate("{x} [mask]", Words()).inputs(["a"], [[1], [2]]), "answers: expected 1, one a text, got 2"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_of_the_other_sort_is_refused():
    verbalizer = Verbalizer(["a", "b"], Words())
    with pytest.raises(ValueError, match="model: expected a causal language model, as the template is for one, got BertFor"):
        verbalizer.scores(bert_for_masked_words(), HardTemplate("{x} [mask]", Words()), TEXTS)
    masked = HardTemplate("{x} [mask]", Words(), is_causal=False)
    with pytest.raises(ValueError, match="model: expected a masked language model, as the template is for one, got Llama"):
        verbalizer.scores(pm.build("llama"), masked, TEXTS)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration"):
        verbalizer.scores(pm.build("t5"), masked, TEXTS)


def test_names_are_public():
    assert {"HardTemplate", "Verbalizer", "precision_at_1"} <= set(peftk.__all__)
