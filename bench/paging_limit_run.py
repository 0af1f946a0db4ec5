"""One process of bench.paging_limit: BUDGET STEPS TOKENS; a budget of 0 is an optimizer without paging."""

from __future__ import annotations

import errno
import resource
import sys

import torch

from bench.report import ROOT
from peftk.cli.models import open_model
from peftk.optim import AdamW
from peftk.paging import stats


def main(budget: int, steps: int, tokens: int) -> None:
    """Every parameter is trained, in fp32, on the first tokens of the public-domain text."""
    model, tokenizer = open_model("smollm2")
    model = model.float().train()
    text = (ROOT / "bench" / "data" / "persuasion.txt").read_text()[:20_000]
    ids = torch.tensor([tokenizer(text)["input_ids"][: steps * tokens]])
    optimizer = AdamW(model.parameters(), lr=1e-5, **({"paged": True, "budget": budget} if budget else {}))
    for i in range(steps):
        batch = ids[:, i * tokens : (i + 1) * tokens]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"  step {i + 1}: loss {loss.item():.4f}, {stats()}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"  {sum(p.numel() for p in model.parameters()) * 8 / 1e6:.0f} MB of moments, peak memory {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    try:
        main(*(int(word) for word in sys.argv[1:]))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        print(f"  out of memory: {str(error).splitlines()[0]}")
        sys.exit(errno.ENOMEM)
