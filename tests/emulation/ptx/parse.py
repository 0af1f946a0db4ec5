"""PTX text -> Module. Names of registers and labels are resolved here, through the scopes of inline assembly."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from .faults import Unsupported
from .syntax import (
    Address,
    Entry,
    Guard,
    Immediate,
    Module,
    Not,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Statement,
    Symbol,
    Variable,
    Vector,
)
from .types import SIZE

NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+U?|0[fFdD][0-9a-fA-F]+|0[bB][01]+U?|\d+U?|\d*\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+)$")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
PIECE = re.compile(
    r"(?P<gap>\s+)|(?P<loc>\.(?:loc|file|version|target|address_size)\b[^\n]*)|(?P<section>\.section\b[^{]*\{[^}]*\})"
    r"|(?P<head>(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.(?:entry|func)\b)|(?P<label>[\w$%]+:)"
    r"|(?P<open>\{)|(?P<close>\})|(?P<statement>[^;]*;)",
    re.S,
)
SPECIALS = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%lanemask_(eq|lt|le|gt|ge)$|%(clock|clock64|clock_hi|globaltimer|globaltimer_lo|globaltimer_hi)$"
    r"|%(laneid|warpid|nwarpid|smid|nsmid|gridid|dynamic_smem_size|total_smem_size)$"
)


def parse(text: str) -> Module:
    """Every kernel and variable of a PTX file. Unsupported for what isn't known."""
    text = COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    return Parser(text).module()


class Parser:
    """One pass over the text; ``at`` is how far it has come."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.seen, self.line = 0, 1  # line numbers are counted as far as seen
        self.parsed = Module()

    def module(self) -> Module:
        """Everything up to the end of the text."""
        for what, piece in self.pieces():
            if what == "head":
                self.function(piece)
            elif what == "statement":
                variable = self.variable(piece)
                self.parsed.variables[variable.name] = variable
            else:
                raise Unsupported(piece.strip(), self.line_at(self.at), "at module level")
        return self.parsed

    def pieces(self) -> Iterator[tuple[str, str]]:
        """What stands next, without gaps and debug information."""
        while found := PIECE.match(self.text, self.at):
            self.at = found.end()
            if found.lastgroup not in ("gap", "loc", "section"):
                self.start = found.start()
                yield str(found.lastgroup), found[0]
        if rest := self.text[self.at :].strip():
            raise Unsupported(rest[:60], self.line_at(self.at), "unfinished")

    def line_at(self, position: int) -> int:
        if position < self.seen:
            return self.text.count("\n", 0, position) + 1
        self.line += self.text.count("\n", self.seen, position)
        self.seen = position
        return self.line

    def variable(self, piece: str) -> Variable:
        """``.shared .align 4 .b8 name[128];`` and the like, initialised or not."""
        body, _, values = piece.rstrip(";").partition("=")
        found = re.match(
            r"(?:\.(?:extern|visible|weak|common)\s+)*\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?(?:\.attribute\([^)]*\)\s*)?"
            r"\.(\w+)\s+([\w$%]+)((?:\s*\[\d*\])*)\s*$",
            body.strip(),
        )
        if not found or found[3] not in SIZE:
            raise Unsupported(piece.strip(), self.line_at(self.start), "a variable was expected")
        count = 1
        for length in re.findall(r"\[(\d*)\]", found[5]):
            count *= int(length or 0)
        size = count * SIZE[found[3]]
        initial = initial_bytes(values, found[3], size) if values else None
        return Variable(found[4], found[1], int(found[2] or SIZE[found[3]]), size, initial)

    def function(self, head: str) -> None:
        """An entry with its body; functions that are called are not supported."""
        line = self.line_at(self.start)
        found = re.compile(r"\s*([\w$]+)\s*\(([^)]*)\)([^{;]*)([{;])", re.S).match(self.text, self.at)
        if not head.endswith("entry") or not found or found[4] == ";":
            raise Unsupported(head, line, "calls are not supported; inline it")
        self.at = found.end()
        entry = Entry(found[1])
        for parameter in filter(None, (part.strip() for part in found[2].split(","))):
            self.parameter(entry, parameter, line)
        for variable in self.parsed.variables.values():
            if variable.space == "shared" and variable.size:
                entry.place(variable)
        Body(self, entry).read()
        for variable in self.parsed.variables.values():  # dynamic shared memory lies behind all that is static
            if variable.space == "shared" and not variable.size:
                entry.shared[variable.name] = -(-entry.shared_bytes // variable.align) * variable.align
        self.parsed.entries[entry.name] = entry

    def parameter(self, entry: Entry, text: str, line: int) -> None:
        """``.param .align 8 .b8 name[32]`` or ``.param .u64 .ptr .global .align 16 name``."""
        found = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.\w+\s+(?:\d+\s+)?)*([\w$]+)(?:\[(\d+)\])?$", text
        )
        if not found or found[2] not in SIZE:
            raise Unsupported(text, line, "a parameter was expected")
        size = SIZE[found[2]] * int(found[4] or 1)
        align = int(found[1] or SIZE[found[2]])
        offset = -(-entry.parameter_bytes // align) * align
        entry.parameters[found[3]] = (offset, size)
        entry.parameter_bytes = offset + size


class Body:
    """The statements of one entry. ``scopes`` hold the declared registers, innermost last."""

    def __init__(self, parser: Parser, entry: Entry):
        self.parser, self.entry = parser, entry
        self.scopes: list[dict[str, Register | str]] = [{}]  # a name, or "%r" with the kind of %r0, %r1, …
        self.scope_names = [""]
        self.opened = 0

    def read(self) -> None:
        """Up to the brace that closes the entry."""
        pending_label = ""
        for what, piece in self.parser.pieces():
            if what == "label":
                pending_label = piece[:-1]
                self.entry.labels[self.scope_names[-1] + pending_label] = len(self.entry.statements)
            elif what == "open":
                self.opened += 1
                self.scopes.append({})
                self.scope_names.append(f"{self.opened}:")
            elif what == "close":
                self.scopes.pop()
                self.scope_names.pop()
                if not self.scopes:
                    return
            else:
                self.statement(piece.rstrip(";").strip(), pending_label)

    def statement(self, text: str, label: str) -> None:
        line = self.parser.line_at(self.parser.start)
        if text.startswith("."):
            self.directive(text, label, line)
        elif text:
            found = re.match(r"(?:@\s*(!?)\s*([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
            if not found:
                raise Unsupported(text, line)
            guard = Guard(self.register(found[2], line), bool(found[1])) if found[2] else None
            try:
                operands = tuple(self.operand(part) for part in split(found[4]))
            except ValueError as why:
                raise Unsupported(text, line, str(why)) from None
            self.entry.statements.append(Statement(found[3], operands, guard, line, re.sub(r"\s+", " ", text)))

    def directive(self, text: str, label: str, line: int) -> None:
        word = text.split()[0]
        if word == ".reg":
            found = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S)
            if not found or found[1] not in SIZE:
                raise Unsupported(text, line)
            for name in (part.strip() for part in found[2].split(",")):
                if many := re.match(r"([\w$%]+)<(\d+)>$", name):
                    self.scopes[-1][many[1] + "<>"] = found[1]
                else:
                    self.scopes[-1][name] = self.fresh(name, found[1])
        elif word in (".shared", ".local"):
            self.entry.place(self.parser.variable(text + ";"))
        elif word == ".branchtargets":
            self.entry.tables[label] = tuple(part.strip() for part in text[len(word) :].split(","))
        elif word != ".pragma":
            raise Unsupported(text, line, "a directive that isn't known")

    def fresh(self, name: str, kind: str) -> Register:
        """A register with the next row of its size."""
        size = 0 if kind == "pred" else SIZE[kind]
        row = self.entry.rows.get(size, 0)
        self.entry.rows[size] = row + 1
        return Register(name, kind, row)

    def find(self, name: str) -> Register | None:
        """The register of that name in the innermost scope that declares it; rows are given out at first use."""
        family = name.rstrip("0123456789") + "<>"
        for scope in reversed(self.scopes):
            if isinstance(known := scope.get(name), Register):
                return known
            if isinstance(kind := scope.get(family), str) and family[:-2] != name:
                made = scope[name] = self.fresh(name, kind)
                return made
        return None

    def register(self, name: str, line: int) -> Register:
        if (found := self.find(name)) is None:
            raise Unsupported(name, line, "no such register")
        return found

    def operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text[0] == "{":
            return Vector(tuple(self.operand(part) for part in split(text[1:-1])))
        if text[0] == "[":
            return self.address(text[1:-1].strip())
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip()), self.operand(second.strip()))
        if text[0] == "!" and (inverted := self.find(text[1:].strip())):
            return Not(inverted)
        if NUMBER.match(text):
            return Immediate(text)
        if SPECIALS.match(text):
            return Special(text[1:])
        if known := self.find(text):
            return known
        if re.match(r"[\w$.]+$", text):
            return self.symbol(text)
        raise ValueError(f"operand {text!r}")

    def symbol(self, name: str) -> Symbol:
        """A label of an inner scope carries that scope's number; such a label is declared before it is used."""
        for scope in reversed(self.scope_names):
            if scope and scope + name in self.entry.labels:
                return Symbol(scope + name)
        return Symbol(name)

    def address(self, text: str) -> Address:
        found = re.match(r"([\w$%]+)\s*(?:\+\s*(-?\s*\w+)|(-\s*\w+))?$", text)
        if not found:
            raise ValueError(f"address [{text}]")
        base = self.operand(found[1])
        if not isinstance(base, Register | Symbol | Immediate):
            raise ValueError(f"address [{text}]")
        offset = (found[2] or found[3] or "0").replace(" ", "")
        return Address(base, Immediate(offset).integer())


def split(text: str) -> list[str]:
    """At the commas outside every bracket."""
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return parts


def initial_bytes(values: str, kind: str, size: int) -> bytes:
    """``{0, 0, 128, 63}`` or a single number, zero behind the last."""
    form = {"f32": "f", "f64": "d"}.get(kind) or {1: "B", 2: "H", 4: "I", 8: "Q"}[SIZE[kind]]
    raw = b""
    for value in (part.strip() for part in values.replace("{", " ").replace("}", " ").split(",")):
        if not NUMBER.match(value):
            raise ValueError(f"initial value {value!r}")
        if form in "fd":
            raw += struct.pack("<" + form, float(Immediate(value).scalar(kind)))
        else:
            raw += struct.pack("<" + form, Immediate(value).integer() & ((1 << (8 * SIZE[kind])) - 1))
    return raw.ljust(size, b"\0")
