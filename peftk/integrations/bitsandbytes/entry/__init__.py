"""What bitsandbytes calls at the end of its import (entry-point group ``bitsandbytes.backends``). An exception from here would
make ``import bitsandbytes`` fail, so none gets out; and since importing peftk may be what fails, the package is installed a
second time as ``peftk_bitsandbytes``, beside peftk, where it can be imported all the same."""

import logging
import os

SWITCH = "PEFTK_BITSANDBYTES"  # "0": bitsandbytes is left alone; "cuda": its GPU kernels are replaced too


def register() -> None:
    """``peftk.integrations.bitsandbytes.enable()``, unless PEFTK_BITSANDBYTES=0; a failure is a warning."""
    switch = os.environ.get(SWITCH, "1")
    if switch == "0":
        return
    try:
        from peftk.integrations.bitsandbytes import enable

        enable(cuda=switch == "cuda")
    except Exception as error:
        logging.getLogger("peftk").warning("bitsandbytes runs without peftk (%s=0 silences this): %s", SWITCH, error)
