"""Resident memory of a training on CPUs, whose batches have ever-new lengths.

Two things keep what torch has freed. oneDNN caches a primitive with its buffers for each shape of a matrix product, a
thousand of them, and nearly every batch brings shapes that do not come again. And glibc keeps freed blocks of ever-new
sizes for later ones that rarely fit. Together they doubled the memory of `recipes/smollm2.yaml` within 100 steps.
"""

import ctypes
import os

from transformers import TrainerCallback


# Primitives; more than a step of one shape needs. Read by oneDNN before its first matrix product.
PRIMITIVE_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
STEPS = 5  # between two returns: each costs a fraction of a second, since the next step asks for the memory again


def limit_primitive_cache() -> None:
    """Makes oneDNN forget shapes sooner, unless the user has set its limit; call it before any work."""
    os.environ.setdefault(*PRIMITIVE_CACHE)


class ReturnFreedMemory(TrainerCallback):
    """Gives the memory that torch has freed back to the system every `STEPS` steps; on Linux with glibc alone."""

    def __init__(self):
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.trim is not None and args.device.type == "cpu" and state.global_step % STEPS == 0:
            self.trim(0)
