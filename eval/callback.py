"""Local tasks measured while a model is trained, by the same code as `run_mteb.py`."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from mteb.abstasks import AbsTask
from transformers import TrainerCallback

from nvembed.eval.measure import measure
from nvembed.eval.models import MAX_LENGTH, LoadedModel, TaskEncoder, embed_with
from nvembed.eval.processes import split_over_processes
from nvembed.eval.results import summarize
from nvembed.eval.select_tasks import instructions_for


class LocalTasksCallback(TrainerCallback):
    """Adds `eval_<task>`, the main score from 0 to 1, and `eval_average` to the metrics of every evaluation.

    `EmbeddingTrainer` uses it every `eval_steps`; any other `Trainer` of an `NVEmbedModel` takes it, too:
    `Trainer(..., callbacks=[LocalTasksCallback(read_tasks("tasks.yaml"))])`. The run of the training itself does not
    change: random numbers are as they were. Processes share the texts out, and all get the scores.

    Args:
        tasks: of `read_tasks`; a subset is a shorter list.
        max_length: tokens of a text with its instruction.
    """

    def __init__(self, tasks: Sequence[AbsTask], max_length: int = MAX_LENGTH):
        self.tasks, self.max_length = list(tasks), max_length
        self.instructions = instructions_for(tasks)

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs) -> None:
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        # As in training: the pooling is fp32, the decoder may be bf16.
        autocast = torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16)
        with autocast, random_numbers_kept():
            scores = self.measure(extract_model_from_parallel(model))
        if metrics is not None:
            metrics.update({f"eval_{name}": round(score, 5) for name, score in scores.items()})

    def measure(self, model) -> dict[str, float]:
        """Main scores by task, and their "average"; every process has them."""
        current = LoadedModel("in training", "now", embed_with(model, self.max_length))
        scores: list = [None]
        with split_over_processes(current.embed) as embed:
            if embed is not None:
                results = measure(self.tasks, TaskEncoder(current, embed, self.instructions))
                summary = summarize(self.tasks, results, current)
                scores = [summary["tasks"] | {"average": summary["average"]}]
        if dist.is_initialized():
            dist.broadcast_object_list(scores, src=0)
        return scores[0]


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """mteb seeds every generator there is; training goes on with the numbers it had."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
