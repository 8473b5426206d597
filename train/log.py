"""Figures for the training log beside the loss: loss by data set, similarities, spread and speed."""

import math
import time
from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import nn

from nvembed.eval.peak_memory import peak_memory
from nvembed.eval.spread import effective_rank
from nvembed.train.losses import Contrast, Spread


logger = get_logger(__name__)

# Dense bf16 FLOP/s of one device by the start of its name, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


RANKED_TEXTS = 512  # the singular values of more would take as long as a small model's step


class LogWindow:
    """Collects figures of the batches between two logs, over all processes.

    Args:
        needs_negatives: whether a window without any is an error...
        is_of_one_set: ... or, where each batch is of one data set, bad luck: all its rows may be of one class.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        count_false_negatives: bool = False,
        needs_negatives: bool = True,
        is_of_one_set: bool = False,
    ):
        self.count_false_negatives, self.needs_negatives = count_false_negatives, needs_negatives
        self.is_of_one_set = is_of_one_set
        self.flops = flops_per_token(model)
        self.device = device
        self.peak_flops = peak_flops(device)
        self._clear()

    def _clear(self) -> None:
        self.start, self.tokens, self.rows, self.datasets = time.perf_counter(), 0, [], []
        self.parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.sample: torch.Tensor | None = None

    def add(
        self,
        batch: Mapping,
        rows: Contrast,
        spread: Spread,
        embeddings: torch.Tensor,
        parts: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Adds a batch; its figures stay on the device until the log.

        Args:
            embeddings: of its texts, `[texts, hidden]`; some are kept.
            parts: a distillation's, by name.
        """
        self.tokens += sum(sum(chunk["lengths"]) for chunk in batch["chunks"])
        left_out = rows.false_negatives + batch["false_negatives"].to(rows.false_negatives.device)
        figures = (rows.losses, rows.positive, rows.hardest_negative, left_out)
        self.rows.append(torch.stack([figure.detach().float() for figure in figures]))
        self.datasets += batch["datasets"]
        self._sample(embeddings.detach())
        figures = {f"kd/{name}": part for name, part in (parts or {}).items()}
        figures |= {"spread_out": spread.penalty, "mean_cosine": spread.mean_cosine}
        for name, figure in figures.items():
            self.parts[name].append(figure.detach().float())

    def _sample(self, embeddings: torch.Tensor) -> None:
        """Keeps up to RANKED_TEXTS of the window's texts, as many of each batch: one may be of one data set."""
        batches = len(self.rows)
        share = RANKED_TEXTS // batches
        pools = (
            [(embeddings, share)] if self.sample is None else [(self.sample, RANKED_TEXTS - share), (embeddings, share)]
        )
        generator = torch.Generator().manual_seed(batches)
        # By chance, since the texts are sorted by length: long ones are passages.
        chosen = [torch.randperm(len(texts), generator=generator)[:count].to(texts.device) for texts, count in pools]
        self.sample = torch.cat([texts[places] for (texts, _), places in zip(pools, chosen)])

    def leave_out(self, seconds: float) -> None:
        """Excludes time spent on something other than training."""
        self.start += seconds

    def _peak_memory(self) -> float:
        try:
            return peak_memory(self.device)
        except OSError:  # this system does not tell
            return 0.0

    def close(self) -> dict[str, float]:
        """Figures for the log, the same on all processes, which must all call it; the next window begins.

        `tokens_per_second` counts each distinct text of a process's batch once and no padding; `share_of_peak`
        sets the arithmetic of one forward and one backward pass over them against the device's peak (on GPUs
        that `PEAK_FLOPS` knows), so a second forward pass lowers it. `loss/<dataset>` and `samples/<dataset>`
        are of this window; similarities are cosines, means over the rows. `false_negatives`, if they are left
        out, is how many. Parts of the loss, unweighted, are `kd/<part>` and `spread_out`; `mean_cosine` is that of
        unrelated queries (`losses.spread_out`), `effective_rank` that of the window's texts, up to RANKED_TEXTS on each
        process. `peak_memory_gb`, where the system tells, is the most that a process has held since its start: that
        torch allocated on its GPU, or resident.

        Raises:
            ValueError: no row of the window had a negative on any process, so that there was nothing to learn.
        """
        seconds, sums = time.perf_counter() - self.start, defaultdict(lambda: [0, 0.0])
        positive, hardest = [0, 0.0], [0, 0.0]
        *figures, left_out = torch.cat(self.rows, dim=1).tolist() if self.rows else [[], [], [], []]
        for dataset, loss, close, near in zip(self.datasets, *figures, strict=True):
            for place, figure in ((sums[dataset], loss), (positive, close), (hardest, near)):
                if figure != float("-inf"):  # a row without negatives
                    place[0], place[1] = place[0] + 1, place[1] + figure
        losses = {name: torch.stack(values).nanmean().item() for name, values in self.parts.items()}
        losses = {name: loss for name, loss in losses.items() if not math.isnan(loss) or name != "mean_cosine"}
        if self.sample is not None:
            losses["effective_rank"] = effective_rank(self.sample)
        own = (self.tokens, dict(sums), positive, hardest, sum(left_out), losses, self._peak_memory())
        everywhere = gather_object([own])
        self._clear()

        if self.needs_negatives and any(part[1] for part in everywhere) and not any(part[3][0] for part in everywhere):
            rows = sum(count for part in everywhere for count, _ in part[1].values())
            nothing = f"none of the last {rows} rows had a negative, so nothing was learned"
            if not self.is_of_one_set:
                raise ValueError(
                    f"{nothing}: give the triplets negatives, raise num_negatives, or, with in_batch_negatives, put "
                    "different texts in a batch"
                )
            logger.warning(f"{nothing}: they may all be of one class; in larger batches, that is rarer")
        tokens_per_second = sum(part[0] for part in everywhere) / seconds
        logs = {"tokens_per_second": round(tokens_per_second, 1)}
        if self.peak_flops is not None:
            logs["share_of_peak"] = round(tokens_per_second * self.flops / (self.peak_flops * len(everywhere)), 4)
        if memory := max(part[6] for part in everywhere):
            logs["peak_memory_gb"] = round(memory, 2)
        for name, place in (("positive_similarity", 2), ("hardest_negative_similarity", 3)):
            if count := sum(part[place][0] for part in everywhere):
                logs[name] = round(sum(part[place][1] for part in everywhere) / count, 4)
        if self.count_false_negatives:
            logs["false_negatives"] = int(sum(part[4] for part in everywhere))
        for name in losses:
            logs[name] = round(sum(part[5][name] for part in everywhere) / len(everywhere), 4)
        for dataset in sorted({name for part in everywhere for name in part[1]}):
            parts = [part[1][dataset] for part in everywhere if dataset in part[1]]
            samples = sum(count for count, _ in parts)
            logs[f"loss/{dataset}"] = round(sum(total for _, total in parts) / samples, 4)
            logs[f"samples/{dataset}"] = samples
        return logs


def flops_per_token(model: nn.Module) -> int:
    """Of the linear maps, forward and backward: 2 a weight forward, 2 for the inputs' gradient, 2 more if trained.

    Attention scores are left out (at 512 tokens of a 7 B decoder 3 %), the latents' own projections, which are made
    once a chunk, and the copy of the untrained latent attention that peft keeps and does not run.
    """
    flops = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("to_kv") and ".original_module." not in name:
            flops += (6 if module.weight.requires_grad else 4) * module.in_features * module.out_features
    return flops


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device, None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for start, peak in PEAK_FLOPS.items() if name.startswith(start)), None)
