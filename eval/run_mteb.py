"""Measures a model on MTEB's tasks and on one's own, as the paper does (section 5.1): one instruction per task.

python eval/run_mteb.py --model DIR_OR_REPO --tasks "MTEB(eng, v1)" --output_dir OUT
accelerate launch eval/run_mteb.py --model DIR_OR_REPO --tasks SciFact my-tasks.yaml --output_dir OUT
"""

import logging
import sys
from dataclasses import dataclass, field

import mteb
import transformers
from accelerate import PartialState
from mteb import ResultCache
from transformers import HfArgumentParser

from nvembed.eval import results
from nvembed.eval.measure import measure
from nvembed.eval.models import MAX_LENGTH, TaskEncoder, load_model
from nvembed.eval.processes import split_over_processes
from nvembed.eval.select_tasks import PAPER_BENCHMARK, instructions_for, select_tasks, with_parts


logger = logging.getLogger("run_mteb")


@dataclass
class EvaluationArguments:
    model: str = field(metadata={"help": "Checkpoint folder or Hub name; any sentence-transformers model, too."})
    output_dir: str = field(metadata={"help": "Folder for the results of this model; run again to resume."})
    tasks: list[str] = field(
        default_factory=lambda: [PAPER_BENCHMARK],
        metadata={"help": "Benchmarks or tasks of mteb, or YAML files that name folders of your own."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    max_length: int = field(default=MAX_LENGTH, metadata={"help": "Tokens of a text with its instruction."})
    batch_tokens: int | None = field(default=None, metadata={"help": "Tokens of a batch; found by device if left out."})
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16, float16."})
    instruct: bool = field(
        default=False, metadata={"help": "Give a sentence-transformers model the tasks' instructions, too."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "For sentence-transformers models with code of their own."}
    )

    def __post_init__(self):
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; it must be a number of tokens, 1 or more")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; it must be a number of tokens, 1 or more")


def run(args: EvaluationArguments) -> dict | None:
    """Measures and writes `summary.json`; returns it on the main process, None on the others.

    Raises:
        ValueError: as `select_tasks`, `load_model`, `claim_folder`, `check_cached` and `measure`.
        ConnectionError: as `measure`.
    """
    state = PartialState()
    tasks = select_tasks(args.tasks)
    model = load_model(
        args.model,
        args.revision,
        args.max_length,
        args.batch_tokens,
        args.dtype,
        args.instruct,
        args.trust_remote_code,
        show_progress_bar=state.is_main_process,
    )
    with split_over_processes(model.embed) as embed:
        if embed is None:
            return None
        instructions = instructions_for(tasks) if model.prompts is None else {}
        settings = {"model": model.name, "revision": model.revision, "mteb": mteb.__version__}
        settings |= {"max_length": args.max_length, "dtype": args.dtype, "instruct": args.instruct}
        folder = results.claim_folder(args.output_dir, settings, instructions)
        cache = ResultCache(folder)
        results.check_cached(cache, model, with_parts(tasks))
        measured = measure(tasks, TaskEncoder(model, embed, instructions), cache)
        summary = results.summarize(tasks, measured, model)
        results.write_json(folder / "summary.json", summary)
        seconds = {name: result.evaluation_time or 0.0 for name, result in measured.items()}
        print(f"\n{model.name} at {model.revision}, {args.max_length} tokens, percent")
        print(results.score_table(summary, seconds))
        return summary


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    transformers.logging.set_verbosity_error()
    (args,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses()
    try:
        run(args)
    except (ValueError, ConnectionError) as error:
        sys.exit(f"run_mteb: {error}")


if __name__ == "__main__":
    main()
