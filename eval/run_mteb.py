"""Measures a model on MTEB's tasks and on one's own, as the paper does (section 5.1): one instruction per task.

python eval/run_mteb.py --model DIR_OR_REPO --tasks "MTEB(eng, v1)" --output_dir OUT
accelerate launch eval/run_mteb.py --model DIR_OR_REPO --tasks SciFact my-tasks.yaml --output_dir OUT
"""

from dataclasses import dataclass, field

import mteb
from mteb import ResultCache

from nvembed.eval import results
from nvembed.eval.arguments import EvaluationArguments, run_script
from nvembed.eval.encoder import TaskEncoder
from nvembed.eval.measure import is_measured, measure
from nvembed.eval.processes import split_over_processes
from nvembed.eval.tasks.lookup import PAPER_BENCHMARK, instructions_for, select_tasks, with_parts
from nvembed.eval.training_data import read_training_data


@dataclass
class MtebArguments(EvaluationArguments):
    tasks: list[str] = field(
        default_factory=lambda: [PAPER_BENCHMARK],
        metadata={"help": "Benchmarks or tasks of mteb, or YAML files that name folders of your own."},
    )


def run(args: MtebArguments) -> dict | None:
    """Measures and writes `summary.json`; returns it on the main process, None on the others.

    Raises:
        ValueError: as `select_tasks`, `load_model`, `claim_folder`, `check_cached` and `measure`.
        ConnectionError: as `measure`.
    """
    tasks = select_tasks(args.tasks)
    certificate = read_training_data(args.model, args.revision)
    model = args.load()
    with split_over_processes(model.embed) as embed:
        if embed is None:
            return None
        instructions = instructions_for(tasks) if model.prompts is None else {}
        settings = args.settings(model) | {"mteb": mteb.__version__}
        known = {task.metadata.name: task for task in with_parts(tasks)}
        decisive = {name: results.conditions(task, instructions.get(name)) for name, task in known.items()}
        folder = results.claim_folder(args.output_dir, settings, decisive)
        cache = ResultCache(folder)
        results.check_cached(cache, model, known.values())
        encoder = TaskEncoder(model, embed, instructions)
        if kept := sum(is_measured(task, encoder, cache) for task in tasks):
            print(f"{kept} of {len(tasks)} tasks were measured before")
        measured = measure(tasks, encoder, cache)
        summary = results.summarize(tasks, measured, model, certificate)
        results.write_json(folder / "summary.json", summary)
        seconds = {name: result.evaluation_time or 0.0 for name, result in measured.items()}
        print(f"\n{model.name} at {model.revision}, {model.max_length} tokens, percent")
        print(results.score_table(summary, seconds))
        return summary


if __name__ == "__main__":
    run_script("run_mteb", MtebArguments, run)
