"""The instruction families. Importing them registers their decoders."""

from . import async_copy, atomics, bits, control, convert, floating, half, integer, matrix, memory, move, warp

__all__ = [
    "async_copy",
    "atomics",
    "bits",
    "control",
    "convert",
    "floating",
    "half",
    "integer",
    "matrix",
    "memory",
    "move",
    "warp",
]
