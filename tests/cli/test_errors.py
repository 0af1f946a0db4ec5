from __future__ import annotations

import json

import pytest

from peftk.cli import info, main
from peftk.cli.errors import UserError, require


def test_require_imports_and_names_the_extra():
    assert require("json", "hf") is json
    with pytest.raises(ImportError, match=r"no_such_package is not installed: pip install 'peftk\[hf\]'"):
        require("no_such_package", "hf")
    with pytest.raises(ImportError, match=r"peftk\[plot\]"):
        require("no_such_package.inner", "plot")


def test_a_package_that_fails_inside_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import not_there_either")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_either"):
        require("halfway", "hf")


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (UserError("--data x: bad"), 2, "peftk info: error: --data x: bad"),
        (ImportError("tqdm is not installed: pip install 'peftk[hf]'"), 2, "peftk info: error: tqdm is not installed"),
        (KeyboardInterrupt(), 130, "peftk info: interrupted"),
    ],
)
def test_exit_status(monkeypatch, capsys, raised, status, told):
    def fail(arguments):
        raise raised

    monkeypatch.setattr(info, "run", fail)
    assert main(["info"]) == status
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("raised", [ValueError("ours"), ImportError("a broken library")])
def test_errors_of_the_program_are_raised(monkeypatch, raised):
    def fail(arguments):
        raise raised

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(type(raised), match=str(raised)):
        main(["info"])
