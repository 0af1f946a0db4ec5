"""Every flag of every command with values that it can't have: status 2, one line on stderr that names the flag and what came,
no traceback, and no folder."""

from __future__ import annotations

import argparse

import pytest

from peftk.cli import main, parser

NEEDED = {
    "finetune": ["--model", "none", "--data", "none.txt", "--out", "out"],
    "generate": ["--model", "none", "--prompt", "x"],
    "quantize": ["--model", "none", "--out", "out"],
    "memory": ["--model", "llama-7b"],
    "merge": ["--model", "none", "--adapter", "a-folder", "--out", "out"],
    "bench": [],
    "info": [],
}
# By the name of a flag's type: what it must refuse.
BY_TYPE = {
    "positive_int": ["0", "-1", "1.5", "x", "", "nan", "1e9"],
    "non_negative_int": ["-1", "1.5", "x", "", "inf"],
    "sequence_length": ["1", "0", "x"],
    "seed": ["-1", "x", str(1 << 62)],
    "positive_float": ["0", "-1", "nan", "inf", "x", "1e999", ""],
    "non_negative_float": ["-0.1", "nan", "inf", "x"],
    "share": ["-0.1", "1", "nan", "x"],
    "share_above_0": ["0", "1.1", "nan", "x"],
    "size": ["x", "-1GB", ""],
    "card": ["no-such-card", ""],
}
# Flags of free text or of a path: wrong uses, which the command itself refuses.
BY_FLAG = {
    ("finetune", "--model"): ["no/such/folder"],
    ("finetune", "--data"): ["no/such/file.txt"],
    ("finetune", "--out"): ["a-file"],
    ("finetune", "--device"): ["abacus", "cuda:99", ""],
    ("generate", "--model"): ["no/such/folder"],
    ("generate", "--adapter"): ["no/such/folder", "a-file"],
    ("generate", "--prompt"): ["", "  "],
    ("generate", "--pair"): ["x"],
    ("generate", "--audio"): ["no.wav"],
    ("generate", "--device"): ["abacus"],
    ("quantize", "--model"): ["no/such/folder"],
    ("quantize", "--out"): ["a-file"],
    ("merge", "--model"): ["no/such/folder"],
    ("merge", "--adapter"): ["no/such/folder", "a-file"],
    ("merge", "--out"): ["a-file"],
    ("memory", "--model"): ["no/such/folder"],
    ("memory", "--target-modules"): ["nothing-of-this-name"],
}
# Any text may be right for these until a model is there: the tests of their commands have the wrong ones.
NEED_A_MODEL = {
    ("finetune", "--target-modules"), ("finetune", "--template"), ("finetune", "--init-text"), ("memory", "--plot"),
    ("merge", "--skip"), ("merge", "--report"), ("merge", "--plot"), ("quantize", "--skip"), ("quantize", "--report"),
    ("quantize", "--plot"),
}  # fmt: skip


def actions() -> list[tuple[str, argparse.Action]]:
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    every = ((name, action) for name, command in commands.choices.items() for action in command._actions)
    return [(name, action) for name, action in every if action.option_strings and action.dest != "help"]


def cases() -> list:
    found = []
    for command, action in actions():
        flag = action.option_strings[0]
        if action.nargs == 0:  # a switch takes no value
            found.append((command, flag, ["=yes"]))
        elif action.choices:
            found.append((command, flag, ["no-such-choice", ""]))
        elif (command, flag) in BY_FLAG:
            found.append((command, flag, BY_FLAG[command, flag]))
        else:
            found.append((command, flag, BY_TYPE.get(getattr(action.type, "__name__", ""), [])))
    return found


@pytest.mark.parametrize(("command", "flag", "wrong"), cases(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_value_is_one_line_and_status_2(command, flag, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("x")
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "none.txt").write_text("the of and to\n")
    for value in wrong:
        given = [flag + value] if value == "=yes" else [flag, value] if not value.startswith("-") else [f"{flag}={value}"]
        try:
            status = main([command, *NEEDED[command], *given])
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr()
        last = said.err.strip().splitlines()[-1] if said.err.strip() else ""
        assert status == 2, f"{given}: {status}: {said}"
        assert "Traceback" not in said.err and "error: " in last
        assert flag in last or flag.strip("-").replace("-", "_") in last, last
        is_refused_by_use = (command, flag) in (("generate", "--prompt"), ("generate", "--pair"), ("generate", "--audio"))
        assert value.strip("=") in last or is_refused_by_use, last
        assert not (tmp_path / "out").exists()


def test_every_flag_has_wrong_values():
    lacking = {(command, flag) for command, flag, wrong in cases() if not wrong}
    assert lacking == NEED_A_MODEL
