"""Splits texts over the processes of `accelerate launch`: the main one measures, the others only embed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch.distributed as dist


Embed = Callable[[list[str], str], np.ndarray]  # (texts, prefix) -> fp32 [texts, width]

PATIENCE = timedelta(days=1)  # the others wait while the main process loads data or scores


@contextmanager
def split_over_processes(embed: Embed) -> Iterator[Embed | None]:
    """Gives the main process an `embed` that splits its texts over all processes, and the others None once it is done.

    The others work while they enter the `with` block: only the main process has anything to do in its body, so tasks,
    caches and files belong to it alone. With one process it gets `embed` itself.

    Raises:
        RuntimeError: on the main process, if one failed to embed.
        SystemExit: on the others, if the main process failed, which reports why.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield embed
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)  # texts and embeddings are host data on every backend
    if dist.get_rank() != 0:
        _serve(embed, group)
        yield None
    else:
        failed = True
        try:
            yield lambda texts, prefix: _share_out(embed, texts, prefix, group)
            failed = False
        finally:
            _scatter([_Stop(failed)] * dist.get_world_size(), group)
    dist.destroy_process_group(group)


class _Stop:
    def __init__(self, failed: bool):
        self.failed = failed


def _scatter(messages: list | None, group):
    received = [None]
    dist.scatter_object_list(received, messages, src=0, group=group)
    return received[0]


def _share_out(embed: Embed, texts: list[str], prefix: str, group) -> np.ndarray:
    """Distributes the texts by length, so that every process has about the same work."""
    processes = dist.get_world_size()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    shares = [order[rank::processes] for rank in range(processes)]
    _scatter([([texts[i] for i in share], prefix) for share in shares], group)
    parts: list = [None] * processes
    dist.gather_object(_attempt(embed, [texts[i] for i in shares[0]], prefix), parts, group=group)
    for rank, part in enumerate(parts):
        if isinstance(part, BaseException):
            raise RuntimeError(f"process {rank} of {processes} failed: {part!r}") from part
    width = next(part.shape[1] for part in parts if part is not None)
    embeddings = np.empty((len(texts), width), dtype=np.float32)
    for share, part in zip(shares, parts):
        if share:
            embeddings[share] = part
    return embeddings


def _serve(embed: Embed, group) -> None:
    while not isinstance(message := _scatter(None, group), _Stop):
        dist.gather_object(_attempt(embed, *message), group=group)
    if message.failed:
        raise SystemExit(1)


def _attempt(embed: Embed, texts: list[str], prefix: str) -> np.ndarray | Exception | None:
    """Returns errors instead of raising them: the other processes would wait for an answer forever."""
    try:
        return embed(texts, prefix) if texts else None
    except Exception as error:
        return error
