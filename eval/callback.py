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

from nvembed.eval.encoder import TaskEncoder
from nvembed.eval.measure import measure
from nvembed.eval.models import MAX_LENGTH, LoadedModel, embed_with
from nvembed.eval.processes import Embed, split_over_processes
from nvembed.eval.results import summarize
from nvembed.eval.sharding import is_sharded
from nvembed.eval.tasks.lookup import instructions_for


class LocalTasksCallback(TrainerCallback):
    """Adds `eval_<task>`, the main score from 0 to 1, and `eval_average` to the metrics of every evaluation.

    `EmbeddingTrainer` uses it every `eval_steps` and at the last step, and logs them. In any other `Trainer` of an
    `NVEmbedModel` they are in the metrics that pick the best checkpoint, and that later callbacks see, but its log is
    written before. The training does not change: random numbers are as they were. Processes share the texts out, and
    all get the scores; where each holds a shard of the weights, all embed everything, because they need each other for
    every layer.

    Args:
        tasks: of `read_tasks`; a subset is a shorter list.
        max_length: tokens of a text with its instruction.
    """

    def __init__(self, tasks: Sequence[AbsTask], max_length: int = MAX_LENGTH):
        self.tasks, self.max_length = list(tasks), max_length
        self.instructions = instructions_for(tasks)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True  # the result, also where eval_steps does not divide the steps

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
        summary = summarize(self.tasks, results, current)
        return summary["tasks"] | {"average": summary["average"]}

    def measure_together(self, embed: Embed) -> dict[str, float]:
        """`measure` with the texts split over the processes; each of them gets the scores."""
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
