"""Measures a model on MTEB's tasks and on one's own, as the paper does (section 5.1): one instruction per task.

python eval/run_mteb.py --model DIR_OR_REPO --tasks "MTEB(eng, v1)" --output_dir OUT
accelerate launch eval/run_mteb.py --model DIR_OR_REPO --tasks SciFact my-tasks.yaml --output_dir OUT

With --query_model, a second model of the same space (a student of `train/distill.py --kd_losses embeddings`) embeds the
queries of retrieval tasks, and `--model` their documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import mteb
from mteb import ResultCache
from mteb.abstasks import AbsTask

from nvembed.eval import results
from nvembed.eval.arguments import EvaluationArguments, run_script
from nvembed.eval.encoder import AsymmetricEncoder, TaskEncoder, routed
from nvembed.eval.measure import is_measured, measure
from nvembed.eval.models import LoadedModel
from nvembed.eval.processes import split_over_processes
from nvembed.eval.tasks.lookup import PAPER_BENCHMARK, instructions_for, select_tasks, with_parts
from nvembed.eval.training_data import read_training_data


@dataclass
class MtebArguments(EvaluationArguments):
    tasks: list[str] = field(
        default_factory=lambda: [PAPER_BENCHMARK],
        metadata={"help": "Benchmarks or tasks of mteb, or YAML files that name folders of your own."},
    )
    task_names: list[str] | None = field(default=None, metadata={"help": "Of all these tasks, those to measure."})
    query_model: str | None = field(
        default=None, metadata={"help": "Another model for the queries of retrieval tasks; `model` embeds documents."}
    )
    query_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a query_model's."})

    def __post_init__(self):
        super().__post_init__()
        if self.query_revision is not None and self.query_model is None:
            raise ValueError(f"query_revision is {self.query_revision} and there is no query_model that it could be of")

    def load_query_model(self) -> LoadedModel | None:
        """As `load_model`, with the settings of `model`."""
        if self.query_model is None:
            return None
        return replace(self, model=self.query_model, revision=self.query_revision).load()


def run(args: MtebArguments) -> dict | None:
    """Measures and writes `summary.json`; returns it on the main process, None on the others.

    Raises:
        ValueError: as `select_tasks`, `load_model`, `claim_folder`, `check_cached` and `measure`.
        ConnectionError: as `measure`.
    """
    tasks = select_tasks(args.tasks, args.task_names)
    certificates = [read_training_data(args.model, args.revision)]
    if args.query_model is not None:
        check_retrieval(tasks)
        certificates.append(read_training_data(args.query_model, args.query_revision))
    queries = args.load_query_model()
    model = args.load()
    with split_over_processes(model.embed if queries is None else routed(model, queries)) as embed:
        if embed is None:
            return None
        models = [model] if queries is None else [model, queries]
        instructions = instructions_for(tasks) if any(one.prompts is None for one in models) else {}
        settings = args.settings(model) | {"mteb": mteb.__version__}
        if queries is not None:
            settings |= {"query_model": queries.name, "query_revision": queries.revision}
        known = {task.metadata.name: task for task in with_parts(tasks)}
        decisive = {name: results.conditions(task, instructions.get(name)) for name, task in known.items()}
        folder = results.claim_folder(args.output_dir, settings, decisive)
        keep = partial(results.keep_texts, folder)
        if queries is None:
            encoder = TaskEncoder(model, embed, instructions, keep)
        else:
            encoder = AsymmetricEncoder(model, queries, embed, instructions, keep)
        cache = ResultCache(folder)
        results.check_cached(cache, model, known.values())
        if kept := sum(is_measured(task, encoder, cache) for task in tasks):
            print(f"{kept} of {len(tasks)} tasks were measured before")
        measured = measure(tasks, encoder, cache)
        texts = results.keep_texts(folder, encoder.texts)
        summary = results.summarize(tasks, measured, models, certificates, texts)
        results.write_json(folder / "summary.json", summary)
        seconds = {name: result.evaluation_time or 0.0 for name, result in measured.items()}
        print(f"\n{model.name} at {model.revision}, {model.max_length} tokens, percent")
        print(results.score_table(summary, seconds))
        return summary


def check_retrieval(tasks: Sequence[AbsTask]) -> None:
    """Raises a `ValueError` if a task does not tell queries from documents."""
    for task in tasks:
        if task.metadata.type != "Retrieval":
            raise ValueError(f"query_model is for retrieval, and {task.metadata.name} is {task.metadata.type}")


if __name__ == "__main__":
    run_script("run_mteb", MtebArguments, run)
