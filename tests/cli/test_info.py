from __future__ import annotations

import subprocess
import sys

import torch

import peftk
from peftk.cli import COMMANDS, main, parser


def test_info_prints_what_runs(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out == f"{peftk.info()}\n"


def test_info_of_an_op(capsys):
    flags = ["--m", "3", "--n", "32", "--k", "64", "--r", "2", "--dtype", "fp32", "--block-size", "128", "--device", "cuda"]
    assert main(["info", "nf4_lora_linear", *flags]) == 0
    explained = peftk.ops.explain("nf4_lora_linear", 3, 32, 64, 2, torch.float32, "cuda", 128)
    assert capsys.readouterr().out == f"{explained}\n"
    assert main(["info", "matmul"]) == 2
    assert "peftk info: error: op: expected one of nf4_linear" in capsys.readouterr().err


def test_the_module_is_the_program():
    done = subprocess.run([sys.executable, "-m", "peftk", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(module.SUMMARY in " ".join(done.stdout.split()) for module in COMMANDS)
    done = subprocess.run([sys.executable, "-m", "peftk"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: peftk" in done.stderr


def test_every_flag_has_help():
    for action in parser()._subparsers._group_actions[0].choices.values():
        assert all(flag.help for flag in action._actions), action.prog
