"""Stops a diverging run and writes its worst batch to a file."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from nvembed.train.losses import Contrast


BAD_BATCH = "bad_batch-{}.jsonl"  # of a process, by its number


class LossGuard:
    """Stops a training whose loss is NaN, infinite, or far above its running mean."""

    FACTOR = 10.0  # times the running mean, or times 1 where that is smaller
    ROWS = 32  # averaged before comparing, at least: a single hard row can have ten times the usual loss

    def __init__(self):
        self.mean: float | None = None
        self._clear()

    def _clear(self) -> None:
        self.total, self.rows = 0.0, 0  # of the batches not in the mean yet
        self.worst: tuple[float, Mapping, list[float]] | None = None  # of these batches, the one to write

    def check(self, loss: float, batch: Mapping, rows: Contrast, path: Path, decode) -> None:
        """Adds the loss of a batch.

        Args:
            path: the file for a bad batch.
            decode: token ids to text.

        Raises:
            FloatingPointError: the loss is NaN or infinite, or over the last `ROWS` rows more than `FACTOR` times its
                running mean; the worst of these batches has been written to `path`.
        """
        if self.worst is None or not loss <= self.worst[0]:  # NaN is the worst
            self.worst = loss, batch, rows.losses.tolist()
        self.total, self.rows = self.total + loss * len(rows.losses), self.rows + len(rows.losses)
        if math.isfinite(loss) and self.rows < self.ROWS:
            return
        recent, worst = self.total / self.rows, self.worst
        self._clear()
        if recent < (float("inf") if self.mean is None else self.FACTOR * max(self.mean, 1.0)):
            self.mean = recent if self.mean is None else 0.95 * self.mean + 0.05 * recent
            return
        write_batch(path, *worst[1:], decode)
        before = "from the start" if self.mean is None else f"{self.mean:.3f} on average before"
        raise FloatingPointError(
            f"the loss is {recent} ({before}); the worst batch is in {path}. Lower learning_rate, lengthen "
            "warmup_steps, or look for broken texts in that file"
        )


def write_batch(path: Path, batch: Mapping, losses: Sequence[float], decode) -> None:
    """Writes the texts as the model read them, row by row, with their losses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [text for chunk in batch["chunks"] for text in _split(chunk, decode)]
    with path.open("w", encoding="utf-8") as file:
        for i, (dataset, loss) in enumerate(zip(batch["datasets"], losses)):
            passages = [texts[j] for j in batch["passage_index"][i].tolist()]
            record = {"dataset": dataset, "loss": loss, "query": texts[batch["query_index"][i]], "passages": passages}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _split(chunk: Mapping, decode) -> Sequence[str]:
    return [decode(ids) for ids in chunk["input_ids"].cpu().split(chunk["lengths"])]
