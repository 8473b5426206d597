"""Measures local tasks during training, with the code of `run_mteb.py`."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from mteb.abstasks import AbsTask
from transformers import TrainerCallback

from nvembed.eval.encoder import TaskEncoder
from nvembed.eval.measure import measure
from nvembed.eval.models import MAX_LENGTH, LoadedModel, embed_with
from nvembed.eval.processes import Embed, split_over_processes
from nvembed.eval.results import summarize
from nvembed.eval.sharding import is_sharded
from nvembed.eval.tasks.lookup import instructions_for


class LocalTasksCallback(TrainerCallback):
    """Adds `eval_<task>`, the main score from 0 to 1, and `eval_average` to the metrics of every evaluation.

    `EmbeddingTrainer` uses it every `eval_steps` and at the last step, and logs the scores. In any other `Trainer` of
    an `NVEmbedModel`, the scores are in the metrics that select the best checkpoint and that later callbacks see, but
    not in its log, which is written earlier. Measuring does not affect training: it restores the random state. The
    processes divide the texts among themselves and all get the scores; if each holds a shard of the weights, all embed
    every text, because each layer needs all of them.

    Args:
        tasks: from `read_tasks`; pass a shorter list for a subset.
        max_length: tokens of a text with its instruction.
    """

    def __init__(self, tasks: Sequence[AbsTask], max_length: int = MAX_LENGTH):
        self.tasks, self.max_length = list(tasks), max_length
        self.instructions = instructions_for(tasks)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True  # measures the final model even if eval_steps does not divide the steps

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs) -> None:
        model = extract_model_from_parallel(model)
        encode = embed_with(model, self.max_length)

        def embed(texts: list[str], prefix: str) -> np.ndarray:
            # As in training: the pooling is fp32, the decoder may be bf16. mteb's own arithmetic is outside.
            dtype = torch.bfloat16 if args.bf16 else torch.float16
            with torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16):
                return encode(texts, prefix)

        with random_numbers_kept():
            scores = self.measure(embed) if is_sharded(model) else self.measure_together(embed)
        if metrics is not None:
            metrics.update({f"eval_{name}": round(score, 5) for name, score in scores.items()})

    def measure(self, embed: Embed) -> dict[str, float]:
        """Main scores by task, and their "average"."""
        current = LoadedModel("in training", "now", embed)
        results = measure(self.tasks, TaskEncoder(current, embed, self.instructions))
        summary = summarize(self.tasks, results, [current], [None])
        return summary["tasks"] | {"average": summary["average"]}

    def measure_together(self, embed: Embed) -> dict[str, float]:
        """`measure` with the texts split over the processes; all of them get the scores."""
        scores: list = [None]
        with split_over_processes(embed) as shared:
            if shared is not None:
                scores = [self.measure(shared)]
        if dist.is_initialized():
            dist.broadcast_object_list(scores, src=0)
        return scores[0]


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Restores the state of all random generators, which mteb seeds."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
