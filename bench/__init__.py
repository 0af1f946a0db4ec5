"""Benches: one an op, under its name in bench/ops. ``python -m bench <op>`` tests the op, then times it beside its peers."""
