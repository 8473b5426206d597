"""The folder of an evaluation: what was measured and how, mteb's results, and the summary.

```
run.json                          model, revision, settings; what decides each task, such as its instruction
results/<model>/<revision>/       mteb's own files, one per task, written as soon as it is done
texts.json                        of each task: how many texts, how many cut, mean cosine, effective rank
summary.json                      scores, category averages, average
```
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean

import mteb
from huggingface_hub import EvalResult
from mteb import ResultCache, TaskResult
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate

from nvembed.eval.files import digest_files, locked, write_json
from nvembed.eval.models import LoadedModel
from nvembed.eval.tasks.instructions import TaskInstruction
from nvembed.eval.training_data import is_seen_by_any, mark


logger = logging.getLogger(__name__)

RUN, TEXTS = "run.json", "texts.json"
CATEGORIES = ("Retrieval", "Reranking", "Clustering", "PairClassification", "Classification", "STS", "Summarization")


def claim_folder(output_dir: str, settings: Mapping, tasks: Mapping[str, Mapping]) -> Path:
    """Claims a folder for one model at one revision with one setting; the same evaluation resumes in it.

    Args:
        settings: model, revision and everything else that affects all scores.
        tasks: what affects the scores of a single task, see `conditions`; compared only for tasks already measured.

    Raises:
        ValueError: the folder holds results of another model, revision, setting or instruction; nothing is changed.
    """
    folder = Path(output_dir)
    if folder.is_file():
        raise ValueError(f"--output_dir {folder} is a file; name a folder")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if RUN not in names and not all(name.startswith(".") for name in names):  # another process may begin here, too
        raise ValueError(f"{folder} holds files that are not of an evaluation; name another --output_dir")
    with _alone(folder):
        _claim(folder, settings, tasks)
    return folder


def _alone(folder: Path) -> AbstractContextManager:
    """Two processes may measure different tasks; what one writes of them, the other keeps."""
    return locked(folder, lambda: None, ".run.lock")


def _claim(folder: Path, settings: Mapping, tasks: Mapping[str, Mapping]) -> None:
    file, record = folder / RUN, {"settings": dict(settings), "tasks": {}}
    if file.is_file():
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            record["settings"].items(), record["tasks"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} does not say what was measured ({error!r}); name another --output_dir") from None
        _check_same(f"{folder} holds results", record["settings"], settings)
    measured = {path.stem for path in folder.glob("results/*/*/*.json")}
    for task in tasks.keys() & measured & record["tasks"].keys():
        _check_same(f"{folder} holds {task}", record["tasks"][task], tasks[task])
    write_json(file, record | {"tasks": record["tasks"] | {task: dict(known) for task, known in tasks.items()}})


def _check_same(what: str, there: Mapping, now: Mapping) -> None:
    for key in sorted(there.keys() | now.keys()):
        if there.get(key) != now.get(key):
            raise ValueError(
                f"{what} with {key} {there.get(key)!r}, this run has {now.get(key)!r}; name another --output_dir"
            )


def conditions(task: AbsTask, instruction: TaskInstruction | None) -> dict:
    """What affects a task's scores besides the model: its instructions, and a local copy of its data."""
    known = {}
    if instruction is not None:
        known |= {"instruction": instruction.query, "instruction of documents": instruction.document}
    if (digest := copy_of_data(task)) is not None:
        known["data of the folder"] = digest
    return known


def copy_of_data(task: AbsTask) -> str | None:
    """A digest of the folder ./<data set>, which `datasets` reads instead of the Hub's; None if there is none."""
    folder = Path(task.metadata.dataset.get("path", ""))
    if hasattr(task, "instruction") or isinstance(task, AbsTaskAggregate) or not folder.is_dir():
        return None
    return digest_files(folder, (path for path in folder.rglob("*") if path.is_file()))


def check_cached(cache: ResultCache, model: LoadedModel, tasks: Iterable[AbsTask]) -> None:
    """Removes results cut off while being written.

    Raises:
        ValueError: a result was measured on another version of the task's data.
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


def about_texts(task: AbsTask, texts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What is known of a task's texts; of an aggregated one, how many its parts have and cut."""
    if not isinstance(task, AbsTaskAggregate):
        return dict(texts.get(task.metadata.name, {}))
    parts = [about_texts(part, texts) for part in task.metadata.tasks]
    if not all("texts" in part and part["cut"] is not None for part in parts):
        return {}
    return {name: sum(part[name] for part in parts) for name in ("texts", "cut")}


def keep_texts(folder: Path, texts: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Adds what is known of some tasks' texts to `texts.json`, and returns what is known of all."""
    file = folder / TEXTS
    with _alone(folder):
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        known = before | {name: dict(figures) for name, figures in texts.items()}
        if known != before:
            write_json(file, known)
    return known


def main_score(task: AbsTask, result: TaskResult) -> float:
    """mteb's main score, 0 to 1, averaged over the task's splits and subsets.

    Raises:
        ValueError: it is not a number, such as a correlation with constants.
    """
    subsets = [part for split in task.eval_splits for part in result.scores[split]]
    score = fmean(part["main_score"] for part in subsets if part["hf_subset"] in task.hf_subsets)
    if not math.isfinite(score):
        raise ValueError(
            f"{task.metadata.name} has the score {score}: are all its labels, or all its scores, the same?"
        )
    return score


def summarize(
    tasks: Iterable[AbsTask],
    results: Mapping[str, TaskResult],
    models: Sequence[LoadedModel],
    certificates: Sequence[Mapping | None],
    texts: Mapping[str, Mapping[str, float]] | None = None,
) -> dict:
    """`summary.json`: scores 0 to 1, averaged as in the paper: a category over its tasks, `average` over all tasks.

    Args:
        models: the one that embedded all texts, or documents, and the one that embedded queries.
        certificates: what each was trained on (`nvembed.eval.training_data`).
        texts: what is known of each task's, as `TaskEncoder` gathers it.
    """
    tasks, texts = list(tasks), texts or {}
    scores = {task.metadata.name: main_score(task, results[task.metadata.name]) for task in tasks}
    types = {task.metadata.name: task.metadata.type for task in tasks}
    model, *others = models
    asked = {"query_model": others[0].name, "query_revision": others[0].revision} if others else {}
    return {
        "tasks": scores,
        "categories": category_averages(scores, types),
        "average": fmean(scores.values()),
        "model": model.name,
        "revision": model.revision,
        **asked,
        "mteb": mteb.__version__,
        "details": {
            task.metadata.name: describe(task)
            | {"training_data": mark(is_seen_by_any(task, certificates))}
            | about_texts(task, texts)
            for task in tasks
        },
    }


def describe(task: AbsTask) -> dict:
    """Type, metric, splits, data set and revision of a task's score; an aggregated task has no data set."""
    known = {"type": task.metadata.type, "metric": task.metadata.main_score, "splits": list(task.eval_splits)}
    if isinstance(task, AbsTaskAggregate):
        return known | {"dataset": None, "dataset_revision": None}
    revision = copy_of_data(task) or task.metadata.revision
    return known | {"dataset": task.metadata.dataset["path"], "dataset_revision": revision}


def eval_results(scores: Mapping[str, float], details: Mapping[str, dict]) -> list[EvalResult]:
    """A model card's `model-index`: scores in percent, as in the released checkpoints' cards.

    Args:
        scores: in percent.
        details: those of `describe`.
    """
    results = []
    for task, score in scores.items():
        detail = details[task]
        for metric in dict.fromkeys(("main_score", detail["metric"])):
            results.append(
                EvalResult(
                    task_type=detail["type"],
                    dataset_type=detail["dataset"] or f"mteb/{task}",  # an aggregated task has none of its own
                    dataset_name=task if "/" not in (detail["dataset"] or "/") else f"MTEB {task}",
                    dataset_config="default",
                    dataset_split=", ".join(detail["splits"]),
                    dataset_revision=detail["dataset_revision"],
                    metric_type=metric,
                    metric_value=round(score, 2),
                )
            )
    return results


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
    lines = [f"{'task':<{width}}{'type':<20}{'metric':<26}{'score':>7}{'seconds':>10}  training data"]
    for name in names:
        detail = summary["details"][name]
        lines.append(
            f"{name:<{width}}{detail['type']:<20}{detail['metric']:<26}{100 * summary['tasks'][name]:>7.2f}"
            f"{seconds[name]:>10.1f}  {detail['training_data']}"
        )
    for name in names:
        if cut := summary["details"][name].get("cut"):
            lines.append(f"{name}: {cut:,} of {summary['details'][name]['texts']:,} texts are cut at max_length")
    lines.append("")
    lines += [f"{name:<{width + 46}}{100 * score:>7.2f}" for name, score in summary["categories"].items()]
    lines.append(f"{'average of ' + str(len(names)) + ' tasks':<{width + 46}}{100 * summary['average']:>7.2f}")
    lines[-1] += f"{sum(seconds.values()):>10.1f}"
    return "\n".join(lines)
