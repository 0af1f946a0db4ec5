"""The papers' experiments: readers on files made here, the whole command on tiny models, records and tables."""

from __future__ import annotations

import csv
import importlib
import json
import random
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
import torch

from bench.papers import __main__ as command
from bench.papers import convert, corpora, ensemble, record, verses, wordnet
from bench.papers.candidates import Candidate
from bench.papers.models import TinyModels
from bench.papers.run import Bench, Experiment, Line, Row, batches, run
from bench.papers.tasks import Sizes, micro_f1, on_first_pieces, split
from bench.papers.texts import Sample, Texts, words_of
from bench.report import Provenance

WHERE = Provenance("2026-01-01", "abc1234", "machine", 1, "avx2", {"torch": "2", "peftk": "0"})

# Lines of WordNet 3.0 (data.noun), their pointers cut.
SYNSETS = """\
  1 This software and database is being provided to you, the LICENSEE, by
00002000 05 n 01 dog 0 000 | a domestic animal; "the dog barked all night"; "a dog"
00002100 05 n 02 hunting_dog 0 hound(p) 0 002 @ 00002000 n 0000 ~ 00002200 n 0000 | a dog used in hunting game
00002200 05 n 01 dachshund 0 001 @ 00002100 n 0000 | small long-bodied short-legged German breed of dog
00003000 20 n 01 oak 0 001 @i 00002000 n 0000 | a deciduous tree of the genus Quercus; has acorns
"""
INDEX = """\
  1 This software and database is being provided to you, the LICENSEE, by
dachshund n 1 1 @ 1 0 00002200
dog n 2 2 @ ~ 2 1 00002000 00003000
hound n 1 1 @ 1 0 00002100
oak n 1 0 1 0 00003000
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Packages as they lie unpacked."""
    words = tmp_path / "usr/share/wordnet"
    words.mkdir(parents=True)
    (words / "data.noun").write_text(SYNSETS)
    (words / "index.noun").write_text(INDEX)
    module = tmp_path / "usr/share/sword/modules/texts/ztext"
    write_module(module / verses.WEB, WEB)
    write_module(module / verses.RV1909, RV)
    return tmp_path


def w(number: str, word: str) -> str:
    return f'<w lemma="strong:{number}">{word}</w>'


def chapter(name: str) -> str:
    return f'<div type="x-p"/><chapter n="1" osisID="{name}" sID="{name}"/>'


WEB = [
    "", "<milestone/>", '<title type="main">A Book</title>', chapter("Gen.1"),
    f"{w('H0430', 'God')}<note>of Israel</note>{w('H1254', 'made')} {w('H0085', 'Abraham')}.",
    f"{w('H0085', 'Abraham')} {w('H1980', 'went')}, and {w('H8283', 'Sarah')} {w('H8283', 'Sarai')} &amp; I.",
    chapter("Gen.2"), f"{w('H1980', 'Went')} {w('H8283', 'Sarah')}", "he went",
]  # fmt: skip
RV = ["", "<milestone/>", chapter("Gen.1"), f"{w('H0430', 'Dios')}", "Abraham fué", chapter("Gen.2"), "una sola"]


def write_module(folder: Path, texts: list[str]) -> None:
    """A zText module of one block a testament; the new one is empty."""
    folder.mkdir(parents=True)
    parts = [text.encode() for text in texts]
    block = zlib.compress(b"".join(parts))
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    (folder / "ot.bzz").write_bytes(block)
    (folder / "ot.bzs").write_bytes(struct.pack("<III", 0, len(block), sum(map(len, parts))))
    (folder / "ot.bzv").write_bytes(b"".join(struct.pack("<IIH", 0, at, len(p)) for at, p in zip(starts, parts, strict=True)))
    for kind in ("bzz", "bzs", "bzv"):
        (folder / f"nt.{kind}").write_bytes(b"")


def test_wordnet_is_read(folder):
    place = folder / "usr/share/wordnet"
    meanings = wordnet.synsets(place)
    assert meanings[2100] == wordnet.Synset(
        2100, "noun.animal", ("hunting dog", "hound"), (2000,), "a dog used in hunting game", ()
    )
    assert meanings[2000].definition == "a domestic animal" and meanings[2000].examples == ("the dog barked all night", "a dog")
    assert meanings[3000].kinds == () and meanings[3000].definition.endswith("has acorns")  # an instance is no kind
    assert wordnet.first_senses(place)["dog"] == 2000
    assert list(wordnet.ancestors(meanings, 2200)) == [2100, 2000]
    assert list(wordnet.kinds_of(place, ["dog"])) == [("dachshund", "dog"), ("hound", "dog")]
    assert dict(wordnet.kinds_of(place, ["dog", "hound"])) == {"dachshund": "hound"}
    with pytest.raises(ValueError, match="labels: expected nouns of WordNet, got kat"):
        list(wordnet.kinds_of(place, ["kat"]))


def test_a_damaged_wordnet_is_named(tmp_path):
    (tmp_path / "data.noun").write_text(SYNSETS + "not a synset\n")
    with pytest.raises(ValueError, match=r"data.noun line 6: expected 'offset class type .* gloss', got 'not a synset'"):
        wordnet.synsets(tmp_path)


def test_verses_are_read_and_aligned(folder):
    web, rv = (folder / "usr/share/sword/modules/texts/ztext" / name for name in (verses.WEB, verses.RV1909))
    assert list(verses.entries(web)) == [("Gen.1", 1), ("Gen.1", 2), ("Gen.2", 1), ("Gen.2", 2)]
    assert verses.plain(verses.entries(web)["Gen.1", 1]) == "God made Abraham."
    # The second chapter counts otherwise in Spanish, and is left out.
    assert [place for place, *_ in verses.aligned(web, rv)] == [("Gen.1", 1), ("Gen.1", 2)]
    assert Texts(folder).aligned()[1] == ("Abraham went, and Sarah Sarai & I.", "Abraham fué")


def test_names_are_found_by_what_they_translate(folder):
    tagged = list(verses.names(folder / "usr/share/sword/modules/texts/ztext" / verses.WEB))
    assert tagged[0] == (["God", "made", "Abraham", "."], ["O", "O", "B-NAME", "O"])
    assert tagged[1][1] == ["B-NAME", "O", "O", "O", "B-NAME", "I-NAME", "O", "O", "O"]
    assert tagged[2] == (["Went", "Sarah"], ["O", "B-NAME"])
    assert len(Texts(folder).names()) == 3


def test_missing_corpora_say_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="wordnet-base unpacked there .*python -m bench.papers fetch --corpora"):
        Texts(tmp_path).kinds()
    assert command.main(["probing", "--corpora", str(tmp_path), "--seeds", "1", "--out", str(tmp_path / "out")]) == 2


def test_fetch_unpacks_archives_and_leaves_the_folder_alone_on_an_error(tmp_path, monkeypatch):
    archives, folder = tmp_path / "debs", tmp_path / "corpora"
    archives.mkdir()
    folder.mkdir()
    (folder / "mine").write_text("kept")

    def unpack(call, **_):
        package = Path(call[2]).name.partition("_")[0]
        file = Path(call[3]) / corpora.PACKAGES[package]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        return subprocess.CompletedProcess(call, 0, "", "")

    monkeypatch.setattr(corpora.shutil, "which", lambda name: name)
    monkeypatch.setattr(corpora.subprocess, "run", unpack)
    (archives / "wordnet-base_1_all.deb").write_bytes(b"")
    with pytest.raises(RuntimeError, match="expected sword-text-web_.*deb, found none"):
        corpora.fetch(folder, archives)
    assert [path.name for path in folder.iterdir()] == ["mine"]
    for name in ("sword-text-web", "sword-text-sparv"):
        (archives / f"{name}_1_all.deb").write_bytes(b"")
    assert corpora.fetch(folder, archives) == list(corpora.PACKAGES)
    assert (folder / "mine").read_text() == "kept" and corpora.find(folder, "wordnet-base").is_file()
    assert corpora.fetch(folder, archives) == []


@pytest.mark.parametrize(
    ("name", "keys"),
    [("glosses", {"text", "label"}), ("names", {"tokens", "tags"}), ("verses", {"source", "target"})],
)
def test_corpora_become_the_commands_jsonl(name, keys, tmp_path):
    counts = convert.convert(Sample(), name, tmp_path / "out", test=5, limit=7)
    lines = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert counts == {"train": 7, "test": 5} and len(lines) == 7 and all(set(line) == keys for line in lines)
    with pytest.raises(ValueError, match="name: expected one of glosses, .*, got 'x'"):
        convert.convert(Sample(), "x", tmp_path / "out")
    with pytest.raises(ValueError, match="test: expected fewer than the 96 records, got 500"):
        convert.convert(Sample(), name, tmp_path / "out")


def test_the_command_runs_every_experiment_on_tiny_models(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    assert command.main(["--quick", "--seeds", "2", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for name in command.EXPERIMENTS:
        spec = command.experiment(name)
        assert spec.name == name and spec.title in told
        rows = record.read(tmp_path / f"{name}.csv")
        of_lines = {(line.candidate.task, line.name) for line in spec.lines}
        assert {(row["task"], row["line"]) for row in rows} == of_lines and len(rows) == 2 * len(of_lines)
        assert all(row["score"] and row["seed"] in "01" for row in rows)
        assert (tmp_path / f"{name}.png").stat().st_size < 60_000
        assert (tmp_path / f"{name}.md").read_text().count("\n| `") == len(of_lines)


def test_wrong_names_are_refused(capsys):
    assert command.main(["probing", "nothing"]) == 2
    assert "experiments: expected some of probing, " in capsys.readouterr().err
    assert command.main(["convert", "glosses"]) == 2
    assert "convert: expected a name" in capsys.readouterr().err


@pytest.fixture(scope="module")
def bench() -> Bench:
    pytest.importorskip("transformers")
    sample = Sample()
    return Bench(TinyModels(words_of(sample)), sample, quick=True)


def test_equal_candidates_are_trained_once_and_the_model_is_left_as_it_was(bench):
    task = bench.task("kinds")
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    one = Candidate("kinds", "prompt tuning", 0.1, 3, (("n", 2),))
    first = bench.measure(Line("a", one), 5)
    again = bench.measure(Line("b", Candidate("kinds", "prompt tuning", 0.1, 3, (("n", 2),))), 5)
    assert again == Row(Line("b", one), 5, "P@1", first.score, first.loss, 64, first.seconds, first.step_seconds)
    assert 0 < first.step_seconds < first.seconds
    other = bench.measure(Line("a", one), 6)
    assert other.loss != first.loss
    after = task.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


def test_training_learns_and_does_so_again(bench, monkeypatch):
    monkeypatch.setattr(importlib.import_module("bench.papers.run"), "QUICK_STEPS", 80)
    learner = Candidate("names", "P-Tuning v2", 0.05, 80, (("n", 4),))
    scores = [Bench(bench.models, bench.texts, quick=True).measure(Line("", learner), 0) for _ in range(2)]
    assert scores[0].score == scores[1].score > 0.9 and scores[0].loss < 0.1


def test_a_vote_is_at_least_as_good_as_its_prompts_agree(bench):
    rows = list(ensemble.rows(bench, ensemble.EXPERIMENT, 0))
    mean, best, vote = (row.score for row in rows)
    assert [row.line for row in rows] == list(ensemble.EXPERIMENT.lines) and mean <= best and 0 <= vote <= 1
    assert "_peftk_adapters" not in vars(bench.task("kinds").model)


def test_batches_go_epoch_by_epoch():
    drawn = [row for batch in batches(range(10), 4, 5, seed=1) for row in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert drawn != [row for batch in batches(range(10), 4, 5, seed=2) for row in batch]


def test_splits_share_nothing():
    train, test = split(range(100), Sizes(30, 20))
    assert len(train) == 30 and len(test) == 20 and not set(train) & set(test)
    assert (train, test) == split(range(100), Sizes(30, 20))
    with pytest.raises(ValueError, match="records: expected at least 50, got 49"):
        split(range(49), Sizes(30, 20))


def test_a_words_further_pieces_have_no_tag():
    assert on_first_pieces([None, 0, 0, 1, 2, 2, None], [1, 0, 2]) == [-100, 1, -100, 0, 2, -100, -100]


def test_micro_f1_leaves_out_o():
    said, right = torch.tensor([0, 1, 2, 1, 0, 1]), torch.tensor([0, 1, 1, 0, 2, 1])
    assert micro_f1(said, right) == pytest.approx(2 * 2 / (4 + 4))
    assert micro_f1(torch.zeros(3), torch.zeros(3)) == 0.0


def test_tables_tell_mean_spread_and_origin(tmp_path):
    lines = (Line("long | short", Candidate("kinds", "prompt tuning", 0.1, 3), 2.0),)
    spec = Experiment("spec", "A title", "A paper, table 1", lines, axis="length")
    rows = [Row(lines[0], seed, "P@1", score, 0.5, 64, 1.0) for seed, score in enumerate((0.25, 0.5, 0.75))]
    table = record.markdown(spec, rows, WHERE)
    assert "After A paper, table 1. 3 seeds" in table and "abc1234" in table and "machine" in table
    assert "| `kinds`, P@1 | long | short | 0.500 ± 0.250 | 0.250, 0.500, 0.750 | 64 | 3 | 0.1 | 1 |" in table
    record.write(spec, rows, WHERE, tmp_path)
    read = record.read(tmp_path / "spec.csv")
    assert [row["score"] for row in read] == ["0.25", "0.5", "0.75"] and read[0]["commit"] == "abc1234" and read[0]["x"] == "2"
    assert record.spread([0.25]) == "0.250"
    with (tmp_path / "other.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b"], ["1", "2"]])
    with pytest.raises(ValueError, match="other.csv: expected the columns date, .*, got a, b"):
        record.read(tmp_path / "other.csv")


def test_recorded_results_are_whole():
    """Of experiments that there are, every line, three seeds, and no run that came to nothing."""
    recorded = {path.stem for path in record.RESULTS.glob("*.csv")}
    assert recorded and recorded <= set(command.EXPERIMENTS)
    for name in recorded:
        rows = record.read(record.RESULTS / f"{name}.csv")
        assert {row["seed"] for row in rows} == {"0", "1", "2"} and all(float(row["score"]) >= 0 for row in rows)
        assert {row["line"] for row in rows} == {line.name for line in command.experiment(name).lines}


def test_experiments_draw_no_random_number_of_ours():
    random.seed(3)
    before = random.getstate()
    run(Bench(None, None), Experiment("none", "", "", ()), range(2), progress=False)
    assert random.getstate() == before
