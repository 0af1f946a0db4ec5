"""python -m gpu.sanitized OP DEVICE IMPLEMENTATION: the op's whole matrix, held against the CPU kernels; what compute-sanitizer
watches. Exit code 1 and a line where a result differs."""

from __future__ import annotations

import sys

import torch

from gpu.calls import Place, differing, matrix


def main(op: str, device: str, implementation: str) -> None:
    torch.manual_seed(0)
    place, every = Place(device, implementation), list(matrix(op))
    for call in every:
        if what := differing(place.run(call), call.expected()):
            raise SystemExit(f"{op} by {place}: {call.what}: {what}")
    print(f"{op} by {place}: {len(every)} calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
