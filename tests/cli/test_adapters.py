from __future__ import annotations

import argparse

import pytest
import tiny_models as tiny

import peftk
from peftk.cli import adapters
from peftk.cli.adapters import FLAGS, METHODS, Setting, make_config, positions_taken, settle
from peftk.cli.errors import UserError

KINDS = {
    "qlora": peftk.LoraConfig,
    "lora": peftk.LoraConfig,
    "dora": peftk.LoraConfig,
    "adalora": peftk.AdaLoraConfig,
    "prefix": peftk.PrefixTuningConfig,
    "prompt": peftk.PromptTuningConfig,
    "ptuning": peftk.PTuningConfig,
    "ptuning-v2": peftk.PTuningV2Config,
}


def parsed(method: str, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    adapters.add_arguments(parser)
    parser.add_argument("--lr", default=None)
    arguments = parser.parse_args(["--method", method, *map(str, flags)])
    settle(arguments)
    return arguments


def config(method: str, *flags: str, labels=None, task="SEQ_CLS", tokenizer=None):
    return make_config(parsed(method, *flags), Setting(task, "base", tiny.gpt2(), tokenizer, labels, None, 50))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_its_config_of_its_defaults(method, tokenizer):
    made = config(method, tokenizer=tokenizer)
    assert type(made) is KINDS[method] and made.task_type == "SEQ_CLS" and made.base_model_name_or_path == "base"
    assert positions_taken(made) == (0 if isinstance(made, peftk.LoraConfig) else 20)
    assert set(METHODS[method].flags) <= set(FLAGS)


@pytest.mark.parametrize("method", METHODS)
def test_a_flag_of_another_method_is_refused_with_both_names(method):
    values = {"prefix_projection": [], "encoder": ["mlp"], "init": ["vocab"]}
    for name in set(FLAGS) - set(METHODS[method].flags):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(UserError, match=rf"^{flag}: --method {method} doesn't know it; it is for \w+"):
            parsed(method, flag, *values.get(name, ["1"]) if name != "dropout" else ["0.1"])


def test_flags_reach_the_config(tokenizer):
    lora = config("lora", "--r", 3, "--alpha", 5, "--dropout", 0.1, "--target-modules", "q", "v")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (3, 5, 0.1, ["q", "v"])
    prefix = config(
        "prefix", *"--num-virtual-tokens 7 --prefix-projection --encoder-hidden-size 9 --dropout 0.2".split(), tokenizer=tokenizer
    )
    assert (prefix.num_virtual_tokens, prefix.prefix_projection, prefix.encoder_hidden_size) == (7, True, 9)
    assert prefix.prefix_dropout == 0.2
    assert len(prefix.init_token_ids) == 7 and all(0 <= token < 61 for token in prefix.init_token_ids)
    assert config("ptuning-v2", "--init", "random", tokenizer=tokenizer).init_token_ids is None
    assert config("prefix", "--init", "text", "--init-text", "the man", tokenizer=tokenizer).init_text == "the man"
    prompt = config("prompt", "--init", "labels", labels=["a", "b"], tokenizer=tokenizer)
    assert (prompt.prompt_tuning_init, prompt.class_labels) == ("CLASS_LABELS", ["a", "b"])
    text = config("prompt", "--init", "text", "--init-text", "the man", tokenizer=tokenizer)
    assert (text.prompt_tuning_init, text.prompt_tuning_init_text) == ("TEXT", "the man")
    placed = config("ptuning", "--template", "[v]*2 {x} [v]", "--encoder", "lstm", tokenizer=tokenizer)
    assert (placed.num_virtual_tokens, placed.encoder_reparameterization_type) == (3, "LSTM")
    assert positions_taken(placed) == 3


def test_bases(tokenizer):
    assert [parsed(method).base for method in ("qlora", "lora", "prompt")] == ["nf4", "dense", "dense"]
    assert parsed("prompt", "--base", "nf4").base == "nf4"
    with pytest.raises(UserError, match="^--base dense: --method qlora is on nf4"):
        parsed("qlora", "--base", "dense")
    assert parsed("prompt").lr == METHODS["prompt"].lr and parsed("prompt", "--lr", "1").lr == "1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["prompt", "--init", "text"], "--init text and --init-text go together"),
        (["prompt", "--init-text", "x"], "--init text and --init-text go together"),
        (["prefix", "--init", "labels"], "--init labels: starts --method prompt, not prefix"),
        (["prompt", "--init", "labels"], "--init labels: --task has no labels"),
        (["prefix", "--encoder-hidden-size", "4"], "--encoder-hidden-size: of the MLP that --prefix-projection brings"),
        (["ptuning", "--encoder", "none", "--encoder-hidden-size", "4"], "--encoder-hidden-size: --encoder none has no layer"),
        (["ptuning", "--template", "no place"], "--method ptuning: template: expected one {x} and at least one"),
        (
            ["ptuning", "--template", "[v] {x}", "--num-virtual-tokens", "3"],
            "--method ptuning: template: expected num_virtual_tokens=3",
        ),
    ],
)
def test_what_does_not_fit_together_is_told(flags, message, tokenizer):
    with pytest.raises(UserError) as error:
        config(*flags, tokenizer=tokenizer)
    assert str(error.value).startswith(message)


def test_a_template_has_no_place_among_tags(tokenizer):
    with pytest.raises(UserError, match="--template: --task token-classification"):
        config("ptuning", "--template", "[v] {x}", task="TOKEN_CLS", tokenizer=tokenizer)
