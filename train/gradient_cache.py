"""Large contrastive batches in small memory: gradient caching (GradCache, Gao et al., arXiv 2101.06983).

The contrastive loss needs the embeddings of the whole batch at once, but the decoder's activations, which take nearly
all of the memory, only for one chunk of texts at a time. So each chunk is embedded without keeping activations, the
loss and its gradient with respect to the embeddings are computed, and each chunk is embedded again to propagate its
share of that gradient. This is gradient checkpointing with a chunk of the batch as the segment, so torch's own does it,
with random state and mixed precision: the second pass draws the same dropout.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nvembed.eval.sharding import is_sharded
from nvembed.modeling_nvembed import NVEmbedModelOutput


def embed_chunks(model: nn.Module, chunks: list[dict]) -> Tensor:
    """Embeds packed chunks of a batch (see `nvembed.texts_nvembed.pack`), keeping only the last one's activations.

    One chunk is an ordinary forward pass. Of several, all but the last, whose backward pass comes first, are embedded
    twice; peak memory is that of the largest chunk.

    Returns:
        Embeddings of all texts in the order of the chunks, `[texts, hidden]`.
    """
    return embed_and_observe(model, chunks, None)[0]


def embed_and_observe(
    model: nn.Module, chunks: list[dict], observe: Callable[[NVEmbedModelOutput, dict], Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """As `embed_chunks`, and the sum of `observe(output, chunk)` over the chunks, a scalar with gradients.

    Args:
        observe: gets the model's output with the states of all layers; None: nothing is observed. Called twice for all
            chunks but the last, like the model.
    """

    def embed(model: nn.Module, chunk: dict) -> tuple[Tensor, Tensor | None]:
        output = model(**chunk, output_hidden_states=observe is not None)
        return output.sentence_embeddings, None if observe is None else observe(output, chunk)

    # DDP must not be prepared for another backward pass during one, so the second passes go around it. Their
    # gradients are averaged all the same: the last chunk's pass arms DDP's hooks, which wait for the sum over chunks.
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    idle = _surplus(inner, chunks) * chunks[-1:]
    parts = [checkpoint(embed, inner, chunk, use_reentrant=False) for chunk in (*idle, *chunks[:-1])]
    parts.append(embed(model, chunks[-1]))
    unused = sum(len(chunk["lengths"]) for chunk in idle)
    # Without a value, but in the graph: every process must run equally many backward passes, too.
    embeddings = torch.cat([embeddings for embeddings, _ in parts])[unused:]
    return embeddings, None if observe is None else sum(observed for _, observed in parts[len(idle) :])


def _surplus(model: nn.Module, chunks: list[dict]) -> int:
    """How many more chunks another process has, if all processes must gather sharded weights equally often."""
    if not (dist.is_initialized() and is_sharded(model)):
        return 0
    most = torch.tensor(len(chunks), device=chunks[0]["input_ids"].device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most) - len(chunks)
