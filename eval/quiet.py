"""Keeps the start of the scripts quiet: a warning about kernels that nothing here uses."""

import logging


def quiet_imports() -> None:
    """Call it before anything imports bitsandbytes, which peft does."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
