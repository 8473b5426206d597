"""bm25s without jax, so that it ranks alike on every machine and leaves GPUs alone.

Where jax is installed, bm25s runs it while it is imported, and jax then takes three quarters of each GPU's memory for
itself (seen on an H200: a training beside it ran out of memory). Its top-k also breaks ties otherwise than numpy's.
"""

import sys


def import_bm25s():
    """The module bm25s, to which jax is not installed."""
    imported = "bm25s" in sys.modules
    jax = sys.modules.get("jax")
    sys.modules["jax"] = None  # type: ignore[assignment]  # makes its import an ImportError
    try:
        import bm25s
    finally:
        if jax is None:
            del sys.modules["jax"]
        else:
            sys.modules["jax"] = jax
    if imported:  # by another library, with jax
        bm25s.selection.JAX_IS_AVAILABLE = False
    return bm25s


bm25s = import_bm25s()
