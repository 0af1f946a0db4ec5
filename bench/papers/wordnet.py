"""WordNet 3.0's database files (wndb(5WN)): glosses with their lexicographer classes, and what is a kind of what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")

# lexnames(5WN), by number.
CLASSES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state noun.substance "
    "noun.time verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption verb.contact "
    "verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()


@dataclass(frozen=True)
class Synset:
    """One meaning."""

    offset: int  # its name in the file
    category: str  # of CLASSES
    words: tuple[str, ...]  # the first is the usual one
    kinds: tuple[int, ...]  # offsets of what it is a kind of, not of what it is an instance of
    definition: str
    examples: tuple[str, ...]


def parse_line(line: str) -> Synset:
    """A line of data.<part>. ValueError where it isn't one."""
    facts, bar, gloss = line.partition(" | ")
    fields = facts.split()
    if not bar or len(fields) < 6:
        raise ValueError(f"expected 'offset class type count word ... | gloss', got {line[:60]!r}")
    count = int(fields[3], 16)
    words = tuple(word.replace("_", " ").partition("(")[0] for word in fields[4 : 4 + 2 * count : 2])
    pointers = fields[5 + 2 * count :]
    kinds = tuple(int(pointers[i + 1]) for i in range(0, 4 * int(fields[4 + 2 * count]), 4) if pointers[i] == "@")
    definition, *quoted = gloss.strip().split('; "')
    examples = tuple(part.strip().rstrip('"') for part in quoted)
    return Synset(int(fields[0]), CLASSES[int(fields[1])], words, kinds, definition, examples)


@lru_cache(maxsize=len(PARTS))
def synsets(folder: Path, part: str = "noun") -> Mapping[int, Synset]:
    """By offset, every meaning in ``folder``/data.``part``; ValueErrors name the file and the line."""
    path = folder / f"data.{part}"
    found = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.startswith("  "):  # the licence
                continue
            try:
                synset = parse_line(line.rstrip())
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path} line {number}: {error}") from error
            found[synset.offset] = synset
    return found


@lru_cache(maxsize=len(PARTS))
def first_senses(folder: Path, part: str = "noun") -> Mapping[str, int]:
    """By word, the offset of the meaning that it has most often."""
    found = {}
    with (folder / f"index.{part}").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("  "):
                continue
            fields = line.split()
            found[fields[0].replace("_", " ")] = int(fields[-int(fields[2])])  # the meanings' offsets stand last, commonest first
    return found


def glosses(folder: Path, parts: Sequence[str] = PARTS) -> Iterator[tuple[str, str]]:
    """(definition, lexicographer class) of every meaning, in the files' order."""
    for part in parts:
        for synset in synsets(folder, part).values():
            yield synset.definition, synset.category


def ancestors(meanings: Mapping[int, Synset], offset: int) -> Iterator[int]:
    """What ``offset`` is a kind of, nearest first, each once; not itself."""
    seen, edge = {offset}, [offset]
    while edge:
        edge = list(dict.fromkeys(up for at in edge for up in meanings[at].kinds if up not in seen))
        seen.update(edge)
        yield from edge


def kinds_of(folder: Path, labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(word, label): nouns of one word and the nearest of ``labels`` that their commonest meaning is a kind of, by word. Words
    that hold a label ("catfish") or have two equally near are left out. ValueError for a label that WordNet lacks."""
    meanings, firsts = synsets(folder), first_senses(folder)
    if unknown := [label for label in labels if label not in firsts]:
        raise ValueError(f"labels: expected nouns of WordNet, got {', '.join(unknown)}")
    roots = {firsts[label]: label for label in labels}
    for word, offset in sorted(firsts.items()):
        if (
            not word.isalpha()
            or not word.isascii()
            or word not in meanings[offset].words
            or any(label in word for label in labels)
        ):
            continue
        label = _nearest(meanings, offset, roots)
        if label is not None:
            yield word, label


def _nearest(meanings: Mapping[int, Synset], offset: int, roots: Mapping[int, str]) -> str | None:
    edge, seen = [offset], {offset}
    while edge:
        edge = [up for at in edge for up in meanings[at].kinds if up not in seen]
        seen.update(edge)
        if found := {roots[at] for at in edge if at in roots}:
            return found.pop() if len(found) == 1 else None
    return None
