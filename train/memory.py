"""Limits the resident memory of training on CPUs, where nearly every batch has new lengths.

Two things hold memory that torch has freed. oneDNN caches a primitive with its buffers for each shape of a matrix
product, a thousand of them, and most shapes never return. And glibc keeps freed blocks for later ones, which rarely
have their sizes. Together they doubled the memory of `recipes/smollm2.yaml` within 100 steps.
"""

import ctypes
import os

from transformers import TrainerCallback


# Primitives; more than a step of one shape needs. Read by oneDNN before its first matrix product.
PRIMITIVE_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
STEPS = 5  # between two returns: each costs a fraction of a second, since the next step asks for the memory again


def limit_primitive_cache() -> None:
    """Makes oneDNN cache fewer shapes, unless the user has set its limit; call it before any computation."""
    os.environ.setdefault(*PRIMITIVE_CACHE)


class ReturnFreedMemory(TrainerCallback):
    """Returns memory that torch has freed to the system every `STEPS` steps; only on Linux with glibc."""

    def __init__(self):
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.trim is not None and args.device.type == "cpu" and state.global_step % STEPS == 0:
            self.trim(0)
