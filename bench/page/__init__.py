"""`python -m bench --page FILE`: every recorded result as one HTML file, its plots inside, that asks nothing of the network."""

from bench.page.page import write

__all__ = ["write"]
