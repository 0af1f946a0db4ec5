"""Benches: one an op, under its name in bench/ops, and those of layers, models and every size (bench/sweep).

``python -m bench <op>`` tests the op, then times it beside its peers.
"""

import os

os.environ["PEFTK_BITSANDBYTES"] = "0"  # bitsandbytes as a peer is what it is without us
