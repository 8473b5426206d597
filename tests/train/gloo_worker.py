"""One process of `test_two_processes_equal_one`: half of the batch through a DDP encoder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from nvembed.train.losses import contrast, spread_out


def main(folder: Path) -> None:
    job = torch.load(folder / "job.pt")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    queries, passages, query_ids, passage_ids, classes = (x.chunk(2)[rank] for x in job["batch"])
    encoder = torch.nn.Linear(10, 7, dtype=torch.float64)
    encoder.load_state_dict(job["weights"])
    encoder = DistributedDataParallel(encoder)
    embeddings = normalize(encoder(torch.cat([queries[:, None], passages], dim=1)), dim=-1)
    options = job["options"] | {"classes": classes if job["has_classes"] else None}
    loss = contrast(embeddings[:, 0], embeddings[:, 1:], query_ids, passage_ids, **options).losses.mean()
    loss = loss + spread_out(embeddings[:, 0], embeddings[:, 1], query_ids, passage_ids[:, 0], classes).penalty
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in encoder.module.named_parameters()}
    torch.save({"loss": loss.item(), **gradients}, folder / f"rank{rank}.pt")


main(Path(sys.argv[1]))
# DDP is gone, so this joins gloo's threads: one that asks for the GIL of a process that ends would abort it.
dist.destroy_process_group()
