"""Benches on a GPU: ``python -m bench --gpu [op ...]``. All of it asks a ``Device`` for its clock: a test can stand one in."""
