"""Records for the experiments: out of the unpacked packages, or a handful written here for a smoke run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.papers import corpora, verses, wordnet

KINDS = (
    "bird fish insect tree flower fruit disease drug weapon vehicle building garment metal color musician scientist dog tool "
    "furniture machine sport fabric"
).split()  # everyday nouns with many kinds, none of them a kind of another
CLASSES = tuple(name for name in wordnet.CLASSES if name.startswith("noun.") and name not in ("noun.Tops", "noun.motive"))


@dataclass(frozen=True)
class Texts:
    """What a folder of unpacked packages holds; every method's list has an order of its own, the same each time."""

    folder: Path

    def _wordnet(self) -> Path:
        return corpora.find(self.folder, "wordnet-base").parent

    def kinds(self) -> list[tuple[str, str]]:
        """(word, one of KINDS)"""
        return list(wordnet.kinds_of(self._wordnet(), KINDS))

    def definitions(self) -> list[tuple[str, str, str]]:
        """(word, what it is a kind of, definition) of nouns in their commonest meaning."""
        meanings = wordnet.synsets(self._wordnet())
        return [
            (word, meanings[meanings[offset].kinds[0]].words[0], meanings[offset].definition)
            for word, offset in wordnet.first_senses(self._wordnet()).items()
            if word.isascii() and word.isalpha() and meanings[offset].words[0] == word and meanings[offset].kinds
        ]

    def glosses(self) -> list[tuple[str, str]]:
        """(definition, one of CLASSES)"""
        return [(text, name) for text, name in wordnet.glosses(self._wordnet(), ["noun"]) if name in CLASSES]

    def names(self) -> list[tuple[list[str], list[str]]]:
        """(words, tags of verses.NAME_TAGS) of the verses that hold a name."""
        module = corpora.find(self.folder, "sword-text-web").parent
        return [(words, tags) for words, tags in verses.names(module) if any(tag != "O" for tag in tags)]

    def aligned(self) -> list[tuple[str, str]]:
        """(English, Spanish) verses."""
        english, spanish = (corpora.find(self.folder, f"sword-text-{name}").parent for name in ("web", "sparv"))
        return [(ours, theirs) for _, ours, theirs in verses.aligned(english, spanish)]


class Sample:
    """The same in small, of a few made-up words: learnable by a model of two layers, no corpus needed."""

    def __init__(self, repeat: int = 8):
        self.words = [
            (f"{stem}{ending}", kind) for kind, stems in _STEMS.items() for stem in stems for ending in ("", "s")
        ] * repeat

    def kinds(self) -> list[tuple[str, str]]:
        return self.words

    def definitions(self) -> list[tuple[str, str, str]]:
        return [(word, kind, f"a small {kind}") for word, kind in self.words]

    def glosses(self) -> list[tuple[str, str]]:
        return [(f"a small {word}", {"bird": "noun.animal", "tree": "noun.plant"}[kind]) for word, kind in self.words]

    def names(self) -> list[tuple[list[str], list[str]]]:
        return [(["the", word, "of", name.title()], ["O", "O", "O", "B-NAME"]) for word, name in self.words]

    def aligned(self) -> list[tuple[str, str]]:
        return [(f"the {word}", f"el {word}") for word, _ in self.words]


_STEMS = {"bird": ("finch", "robin", "heron"), "tree": ("oak", "elm", "birch")}


def words_of(sample: Sample) -> list[str]:
    """Every word of a sample: the vocabulary of its models."""
    lines: list[Sequence[str]] = [text.split() for text, _ in sample.glosses()]
    lines += [words for words, _ in sample.names()] + [text.split() for *_, text in sample.definitions()]
    return sorted({word for line in lines for word in line} | {"a", "is", "kind", "of", "bird", "tree", ":"})
