"""Bible verses from SWORD modules (zText): by chapter and verse, aligned over two languages, and with names marked by the Hebrew
and Greek words (Strong's numbers) that the translators put beside theirs."""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

WEB, RV1909 = "engWEB2015eb", "spaRV1909eb"
NAME_TAGS = ("O", "B-NAME", "I-NAME")
GOD = frozenset("H3068 H3069 H0430 H0136 H0113 H0410 G2316 G2962".split())  # God and Lord: titles rather than names

_CHAPTER = re.compile(r'<chapter [^>]*osisID="([^"]+)"[^>]*sID=')
_ASIDE = re.compile(r"<(note|title)\b[^>]*?(?:/>|>.*?</\1>)", re.DOTALL)  # footnotes and headings
_WORD = re.compile(r'<w [^>]*lemma="([^"]*)"[^>]*>(.*?)</w>|([^<]+)|<[^>]*>', re.DOTALL)
_ALWAYS_LARGE = re.compile(r"[IO](?:[’'].*)?")
_TOKEN = re.compile(r"\w+(?:[’'-]\w+)*|[^\w\s]")

Place = tuple[str, int]  # such as ("Gen.1", 3)


@lru_cache(maxsize=4)
def entries(module: Path) -> Mapping[Place, str]:
    """By chapter and verse, the marked-up text of a zText module with OSIS chapter marks, in order. The entries behind the one
    that opens a chapter are its verses: no table of a Bible's verses is needed."""
    found: dict[Place, str] = {}
    for testament in ("ot", "nt"):
        chapter, verse = None, 0
        for text in _texts(module, testament):
            marks = _CHAPTER.findall(text)
            if marks:
                chapter, verse = marks[-1], 0
            elif chapter is not None:
                verse += 1
                if text:
                    found[chapter, verse] = text
    return found


def _texts(module: Path, testament: str) -> Iterator[str]:
    """Every entry: bzz holds deflated blocks, bzs where they lie, bzv block, start and length of an entry."""
    read = {kind: (module / f"{testament}.{kind}").read_bytes() for kind in ("bzs", "bzv", "bzz")}
    blocks = [zlib.decompress(read["bzz"][at : at + n]) if n else b"" for at, n, _ in struct.iter_unpack("<III", read["bzs"])]
    for block, start, length in struct.iter_unpack("<IIH", read["bzv"]):
        yield blocks[block][start : start + length].decode("utf-8") if length else ""


def plain(marked: str) -> str:
    """A verse without marks, notes and headings."""
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", _ASIDE.sub(" ", marked))).split())
    return re.sub(r" (?=[.,;:!?])", "", text)  # where a note stood


def aligned(english: Path, spanish: Path) -> Iterator[tuple[Place, str, str]]:
    """(place, English, Spanish) of chapters with as many verses in both: elsewhere the same number may be another verse."""
    ours, theirs = entries(english), entries(spanish)
    counts = [Counter(chapter for chapter, _ in module) for module in (ours, theirs)]
    for place, marked in ours.items():
        if place in theirs and counts[0][place[0]] == counts[1][place[0]]:
            texts = plain(marked), plain(theirs[place])
            if all(texts):
                yield place, *texts


@dataclass(frozen=True)
class Token:
    """A word or a sign of a verse."""

    text: str
    numbers: tuple[str, ...]  # Strong's, such as "H0085"
    opens: bool  # a sentence, so that its capital says nothing


def tokens(marked: str) -> list[Token]:
    """The words and signs of a verse."""
    found: list[Token] = []
    opens = True
    for numbers, word, between in _WORD.findall(_ASIDE.sub("", marked)):
        strongs = tuple(re.findall(r"[HG]\d+", numbers))
        for text in _TOKEN.findall(html.unescape(re.sub(r"<[^>]*>", "", word) or between)):
            found.append(Token(text, strongs, opens))
            opens = text in ".!?:;“‘”’\"'" and (opens or text not in "”’'")
    return found


def names(module: Path) -> Iterator[tuple[list[str], list[str]]]:
    """(words, tags of NAME_TAGS) of every verse, in order. Silver: nobody has checked them."""
    verses = [tokens(marked) for marked in entries(module).values()]
    known = _known_names(verses)
    for verse in verses:
        is_name = [token.text in known for token in verse]
        before = [False, *is_name]
        tags = ["O" if not now else "I-NAME" if was else "B-NAME" for was, now in zip(before, is_name, strict=False)]
        yield [token.text for token in verse], tags


def _known_names(verses: Sequence[Sequence[Token]]) -> set[str]:
    """Words that are names, by two facts that no single verse shows: they are hardly ever written small, and what they translate
    is mostly (every second time) a word that is written with a capital inside sentences. God and Lord (GOD) don't count."""
    numbers = _numbers_of_names(verses) - GOD
    small, large, named = Counter(), Counter(), Counter()
    for verse in verses:
        for token in verse:
            if token.text.islower():
                small[token.text] += 1
            elif token.text[0].isupper() and not _ALWAYS_LARGE.fullmatch(token.text):
                large[token.text] += 1
                named[token.text] += bool(numbers & set(token.numbers))
    return {word for word, n in large.items() if 2 * named[word] >= n and 20 * small[word.lower()] < n}


def _numbers_of_names(verses: Sequence[Sequence[Token]]) -> set[str]:
    """Those whose words have a capital inside sentences at least every second time."""
    large, all_of = Counter(), Counter()
    for verse in verses:
        for token in verse:
            if not token.opens and token.text[0].isalpha():
                all_of.update(token.numbers)
                large.update(token.numbers if token.text[0].isupper() else ())
    return {number for number, n in all_of.items() if 2 * large[number] >= n}
