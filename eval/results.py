"""The folder that an evaluation writes: what was measured and how, mteb's results, the summary.

```
run.json                          model, revision, settings; instruction of each task
results/<model>/<revision>/       mteb's own files, one per task, written as soon as it is done
summary.json                      scores, category averages, average
```
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import mteb
from mteb import ResultCache, TaskResult
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate

from nvembed.eval.instructions import TaskInstruction
from nvembed.eval.models import LoadedModel


logger = logging.getLogger(__name__)

CATEGORIES = ("Retrieval", "Reranking", "Clustering", "PairClassification", "Classification", "STS", "Summarization")


def write_json(path: Path, content) -> None:
    """Writes beside the path and renames: the file is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def claim_folder(output_dir: str, settings: Mapping, instructions: Mapping[str, TaskInstruction]) -> Path:
    """A folder for results of one model at one revision with one setting each; run again, the same folder resumes.

    Args:
        settings: model, revision and whatever else changes scores.
        instructions: by task; one that differs is wrong only where a result was measured with the earlier one.

    Raises:
        ValueError: the folder holds results of another model, revision, setting or instruction; nothing is changed.
    """
    folder, record = Path(output_dir), {"settings": dict(settings), "instructions": {}}
    file = folder / "run.json"
    if file.is_file():
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            record["settings"].items(), record["instructions"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} does not say what was measured ({error!r}); name another --output_dir") from None
        for key in sorted(settings.keys() | record["settings"].keys()):
            there, now = record["settings"].get(key), settings.get(key)
            if there != now:
                raise ValueError(
                    f"{folder} holds results with {key} {there!r}, this run has {now!r}; name another --output_dir"
                )
    elif folder.is_file():
        raise ValueError(f"--output_dir {folder} is a file; name a folder")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that are not of an evaluation; name another --output_dir")
    measured = {path.stem for path in folder.glob("results/*/*/*.json")}
    for task, instruction in instructions.items():
        earlier = record["instructions"].get(task, asdict(instruction))
        record["instructions"][task] = asdict(instruction)
        if earlier != asdict(instruction) and task in measured:
            raise ValueError(
                f"{folder} holds {task} with the instruction {earlier['query']!r}, this run has "
                f"{instruction.query!r}; name another --output_dir"
            )
    write_json(file, record)
    return folder


def check_cached(cache: ResultCache, model: LoadedModel, tasks: Iterable[AbsTask]) -> None:
    """Removes results that a kill cut off in the middle.

    Raises:
        ValueError: a result is of another state of the task's data.
    """
    for task in tasks:
        path = cache.get_task_result_path(task.metadata.name, model.name, model.revision)
        if not path.is_file():
            continue
        try:
            revision = json.loads(path.read_text(encoding="utf-8"))["dataset_revision"]
        except (ValueError, KeyError):
            logger.warning("%s was cut off when it was written; the task is measured again", path)
            path.unlink()
            continue
        if revision != task.metadata.revision:
            raise ValueError(
                f"{path} was measured on revision {revision} of the data of {task.metadata.name}, which is now "
                f"{task.metadata.revision}; name another --output_dir, or remove the file to measure it again"
            )


def main_score(task: AbsTask, result: TaskResult) -> float:
    """mteb's main score, 0 to 1, averaged over the task's splits and subsets.

    Raises:
        ValueError: it is not a number, as a correlation with constants.
    """
    subsets = [part for split in task.eval_splits for part in result.scores[split]]
    score = fmean(part["main_score"] for part in subsets if part["hf_subset"] in task.hf_subsets)
    if not math.isfinite(score):
        raise ValueError(
            f"{task.metadata.name} has the score {score}: are all its labels, or all its scores, the same?"
        )
    return score


def summarize(tasks: Iterable[AbsTask], results: Mapping[str, TaskResult], model: LoadedModel) -> dict:
    """`summary.json`: scores 0 to 1, averaged as the paper does: a category over its tasks, the last over all tasks."""
    scores = {task.metadata.name: main_score(task, results[task.metadata.name]) for task in tasks}
    types = {task.metadata.name: task.metadata.type for task in tasks}
    details = {
        task.metadata.name: {
            "type": task.metadata.type,
            "metric": task.metadata.main_score,
            "splits": list(task.eval_splits),
            "dataset": None if isinstance(task, AbsTaskAggregate) else task.metadata.dataset["path"],
            "dataset_revision": None if isinstance(task, AbsTaskAggregate) else task.metadata.revision,
        }
        for task in tasks
    }
    return {
        "tasks": scores,
        "categories": category_averages(scores, types),
        "average": fmean(scores.values()),
        "model": model.name,
        "revision": model.revision,
        "mteb": mteb.__version__,
        "details": details,
    }


def category_averages(scores: Mapping[str, float], types: Mapping[str, str]) -> dict[str, float]:
    """Mean score of each type of task, in the paper's order of types, then others."""
    order = [*CATEGORIES, *sorted(set(types.values()) - set(CATEGORIES))]
    members = {category: [scores[task] for task in scores if types[task] == category] for category in order}
    return {category: fmean(values) for category, values in members.items() if values}


def score_table(summary: dict, seconds: Mapping[str, float]) -> str:
    """The summary for a terminal, in percent, with the time that each task took."""
    names = sorted(
        summary["tasks"], key=lambda name: list(summary["categories"]).index(summary["details"][name]["type"])
    )
    width = max(map(len, [*names, *summary["categories"]])) + 2
    lines = [f"{'task':<{width}}{'type':<20}{'metric':<26}{'score':>7}{'seconds':>10}"]
    for name in names:
        detail = summary["details"][name]
        lines.append(
            f"{name:<{width}}{detail['type']:<20}{detail['metric']:<26}{100 * summary['tasks'][name]:>7.2f}"
            f"{seconds[name]:>10.1f}"
        )
    lines.append("")
    lines += [f"{name:<{width + 46}}{100 * score:>7.2f}" for name, score in summary["categories"].items()]
    lines.append(f"{'average of ' + str(len(names)) + ' tasks':<{width + 46}}{100 * summary['average']:>7.2f}")
    lines[-1] += f"{sum(seconds.values()):>10.1f}"
    return "\n".join(lines)
