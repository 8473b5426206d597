"""One of two processes of `test_cached_gradients_in_two_processes`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nvembed.modeling_nvembed import MistralDecoderLayer
from nvembed.train.collator import TripletCollator
from nvembed.train.gradient_cache import embed_chunks
from tests.train.test_gradient_cache import adapted, loss_and_gradients, with_all_activations


def distribute(model, sharding):
    if sharding == "ddp":
        return DistributedDataParallel(model)
    for module in model.modules():
        if isinstance(module, MistralDecoderLayer):
            fully_shard(module)
    return fully_shard(model)


def whole_gradients(result):
    loss, gradients = result
    gathered = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return loss, {name.removeprefix("module."): gradient for name, gradient in gathered.items()}


def keep_all(model, chunks):
    """All activations kept; DDP is prepared for the backward pass by the last call alone."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return torch.cat([with_all_activations(inner, chunks[:-1]), model(**chunks[-1]).sentence_embeddings])


folder = Path(sys.argv[1])
job = torch.load(folder / "job.pt")
dist.init_process_group("gloo")
rank = dist.get_rank()
mine = job["triplets"][4 * rank : 4 * rank + 4]


def run(dropout, chunk_tokens, embed):
    model = adapted(job["checkpoint"], dropout=dropout)
    batch = TripletCollator(model.tokenizer, model.config, 128, 1, chunk_tokens=chunk_tokens)(mine)
    model = distribute(model, job["sharding"])
    return len(batch["chunks"]), whole_gradients(loss_and_gradients(model, batch, embed))


# With dropout against all activations kept, in as many chunks on both; then in more on the second process.
kept = run(0.1, 1, keep_all)[1]
cached = run(0.1, 1, embed_chunks)[1]
chunks, plain = run(0.0, 60 if rank else 150, embed_chunks)
torch.save({"kept": kept, "cached": cached, "chunks": chunks, "plain": plain}, folder / f"rank{rank}.pt")
dist.destroy_process_group()
