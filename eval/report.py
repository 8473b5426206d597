"""Scores of several models side by side, beside the paper's: Markdown, CSV, a bar chart, metadata for model cards.

python eval/report.py RUN [RUN ...] --output_dir OUT [--names NAME ...]

A RUN is what `run_mteb.py` wrote, or a JSON list of {"task", "type", "score"} in percent.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import fmean

from huggingface_hub import ModelCardData
from matplotlib.figure import Figure

from nvembed.eval.markdown_table import markdown_table
from nvembed.eval.plots import COLORS, HATCHES
from nvembed.eval.results import category_averages, eval_results


SEEN = " *"  # beside scores of tasks whose training data the model has seen


@dataclass
class Run:
    """Scores of one model in percent.

    Args:
        types: task -> type, such as "Retrieval".
        details: metric and data set of each task, from `summary.json`; empty for a list of scores.
        seconds: time that each task took, if known.
    """

    name: str
    tasks: dict[str, float]
    types: dict[str, str]
    details: dict[str, dict] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def read_run(path: str) -> Run:
    """A folder that `run_mteb.py` wrote, its `summary.json`, or a JSON list of task, type and score in percent.

    Raises:
        ValueError: there is none of these; the error names what is missing.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "summary.json"
        if not file.is_file():
            raise ValueError(f"{file} does not exist: the run is not finished; start run_mteb.py again to finish it")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; name a folder that run_mteb.py wrote, or a JSON file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    try:
        if isinstance(content, list):
            tasks = {row["task"]: float(row["score"]) for row in content}
            if not tasks:
                raise ValueError("it is empty")
            return Run(file.stem, tasks, {row["task"]: row["type"] for row in content})
        details = content["details"]
        tasks = {task: 100 * score for task, score in content["tasks"].items()}
        types = {task: details[task]["type"] for task in tasks}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is neither a summary of run_mteb.py nor a list of task, type, score: {error!r}"
        ) from None
    name = content["model"] + (f" queried by {content['query_model']}" if "query_model" in content else "")
    return Run(name, tasks, types, details, _seconds(file.parent, content))


def _seconds(folder: Path, summary: dict) -> dict[str, float]:
    place = folder / "results" / summary["model"].replace("/", "__").replace(" ", "_") / summary["revision"]
    results = {task: place / f"{task}.json" for task in summary["tasks"]}
    return {task: json.loads(p.read_text())["evaluation_time"] or 0.0 for task, p in results.items() if p.is_file()}


@dataclass
class Comparison:
    """Runs and the paper's models over the same tasks: the union of the runs'.

    Args:
        averages: per model the mean of each category and "average"; None if the model lacks a task of it, or if the
            paper's average is over other tasks.
        released: NV-Embed-v2's score per task of the paper.
    """

    runs: list[Run]
    types: dict[str, str]
    averages: dict[str, dict[str, float | None]]
    released: dict[str, float]

    @property
    def categories(self) -> list[str]:
        return list(category_averages(dict.fromkeys(self.types, 0.0), self.types))


def compare(runs: Sequence[Run]) -> Comparison:
    """
    Raises:
        ValueError: two runs have one name, or two types for one task; a run is called as one of the paper's models
            that are shown beside it.
    """
    types: dict[str, str] = {}
    for run in runs:
        if sum(other.name == run.name for other in runs) > 1:
            raise ValueError(f"two runs are called {run.name!r}; give each a name of its own with --names")
        for task, kind in run.types.items():
            if types.setdefault(task, kind) != kind:
                raise ValueError(f"{task} is of type {types[task]} in one run and {kind} in {run.name}")
    reference = json.loads((files("nvembed.eval") / "references.json").read_text())
    paper = {task: row["type"] for task, row in reference["tasks"].items()}
    local = {task for run in runs for task, detail in run.details.items() if "/" not in (detail["dataset"] or "/")}
    measured = {task for task in types if paper.get(task) == types[task] and task not in local}
    released = {task: reference["tasks"][task]["score"] for task in types if task in measured}
    averages = {run.name: _averages(run.tasks, types) for run in runs}
    if released:
        stated_names = reference["averages"].keys()
        if taken := stated_names & averages.keys():
            raise ValueError(
                f"a run is called {min(taken)!r}, as one of the paper's models: give it another by --names"
            )
        same = {"NV-Embed-v2": _averages(released, types)}  # of these tasks, where the paper's averages are over others
        for name, stated in reference["averages"].items():
            averages[name] = {
                column: stated[column]
                if _tasks(types, column) == _tasks(paper, column)
                else same.get(name, {}).get(column)
                for column in same["NV-Embed-v2"]
            }
        averages = {name: row for name, row in averages.items() if name not in stated_names or any_value(row)}
    return Comparison(list(runs), types, averages, released)


def any_value(row: dict[str, float | None]) -> bool:
    return any(score is not None for score in row.values())


def _tasks(types: dict[str, str], column: str) -> set[str]:
    return {task for task, kind in types.items() if column in (kind, "average")}


def _averages(scores: dict[str, float], types: dict[str, str]) -> dict[str, float | None]:
    columns = [*category_averages(dict.fromkeys(types, 0.0), types), "average"]
    members = {column: _tasks(types, column) for column in columns}
    return {
        column: fmean(scores[task] for task in tasks) if tasks <= scores.keys() else None
        for column, tasks in members.items()
    }


# --- Tables


def average_rows(comparison: Comparison) -> list[list[str]]:
    """Header and one row per model; the header gives the number of tasks in each category."""
    sizes = {c: len(_tasks(comparison.types, c)) for c in [*comparison.categories, "average"]}
    rows = [["", *(f"{column} ({size})" for column, size in sizes.items()), "minutes"]]
    seconds = {run.name: run.seconds for run in comparison.runs}
    for name, averages in comparison.averages.items():
        timed = seconds.get(name, {}).keys() >= comparison.types.keys()
        minutes = f"{sum(seconds[name].values()) / 60:.1f}" if timed else "-"
        rows.append([name, *(_percent(averages[column]) for column in sizes), minutes])
    return rows


def task_rows(comparison: Comparison, marks: bool = False) -> list[list[str]]:
    """Header and one row per task: type, metric, each run's score, and its difference to NV-Embed-v2's.

    Args:
        marks: mark scores of tasks that the model has seen training data of.
    """
    names = [run.name for run in comparison.runs]
    beside = ["NV-Embed-v2", *(f"{name} - NV-Embed-v2" for name in names)] if comparison.released else []
    rows = [["task", "type", "metric", *names, *beside]]
    for task in sorted(comparison.types, key=lambda task: comparison.categories.index(comparison.types[task])):
        metric = next((run.details[task]["metric"] for run in comparison.runs if task in run.details), "-")
        scores = [run.tasks.get(task) for run in comparison.runs]
        seen = [run.details.get(task, {}).get("training_data") == "seen" for run in comparison.runs]
        shown = [_percent(score) + SEEN * (marks and was_seen) for score, was_seen in zip(scores, seen)]
        row = [task, comparison.types[task], metric, *shown]
        if beside:
            known = comparison.released.get(task)
            row.append(_percent(known))
            row += ["-" if None in (score, known) else f"{score - known:+.2f}" for score in scores]
        rows.append(row)
    return rows


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def csv_table(rows: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([["" if cell == "-" else cell for cell in row] for row in rows])
    return out.getvalue()


def markdown_report(comparison: Comparison) -> str:
    notes = [
        "Percent. A category is the mean of its tasks, the average the mean of all tasks; - where tasks are lacking."
    ]
    if len(comparison.averages) > len(comparison.runs):
        notes.append(
            "NV-Embed-v1, v2 and E5-mistral-7b: the paper's averages where they are over the same tasks, elsewhere "
            "NV-Embed-v2's released scores, averaged."
        )
    elif not comparison.released:
        notes.append("None of these tasks is the paper's, so its models have no row.")
    return (
        f"# Scores\n\n{' '.join(notes)}\n\n![Averages by category](report.png)\n\n"
        f"{markdown_table(average_rows(comparison))}\n\n## Tasks\n\n{seen_note(comparison)}"
        f"{markdown_table(task_rows(comparison, marks=True), 3)}\n{spread_section(comparison)}"
    )


def spread_section(comparison: Comparison) -> str:
    """How much each model's embeddings crowd, task by task; "" if no run knows."""
    names = ("mean_cosine", "effective_rank")
    runs = [run for run in comparison.runs if any("mean_cosine" in detail for detail in run.details.values())]
    if not runs:
        return ""
    rows = [["task", *(f"{run.name}: {name.replace('_', ' ')}" for run in runs for name in names)]]
    for task in comparison.types:
        figures = [run.details.get(task, {}).get(name) for run in runs for name in names]
        if any(figure is not None for figure in figures):
            rows.append([task, *("-" if figure is None else f"{figure:g}" for figure in figures)])
    return (
        "\n## Spread\n\nOf up to 1,000 texts of each task, of retrieval documents (queries, if an earlier version "
        "measured it): the mean cosine of two of them (near 0 where embeddings use all directions), and over how many "
        "dimensions they spread (the exponential of the entropy of their singular "
        f"values).\n\n{markdown_table(rows, 1)}\n"
    )


def seen_note(comparison: Comparison) -> str:
    """What the marks mean, and for which models nothing is known."""
    unknown = [run.name for run in comparison.runs if not known_training_data(run)]
    note = "\\* Training data of the task's own set was trained on; scores without it are zero-shot."
    if len(unknown) == len(comparison.runs):
        return ""
    return note + (f" Not known for {', '.join(unknown)}.\n\n" if unknown else "\n\n")


def known_training_data(run: Run) -> bool:
    return any(detail.get("training_data") in ("seen", "zero-shot") for detail in run.details.values())


# --- Chart


def draw(comparison: Comparison, path: Path) -> None:
    """Bars per category and for the average, one colour and hatch per model, legend below.

    Raises:
        ValueError: no average, or more models than colours.
    """
    models = {name: row for name, row in comparison.averages.items() if any_value(row)}
    if not models:
        raise ValueError("these runs have no category of tasks in common, so no average; report each alone")
    if len(models) > len(COLORS):
        raise ValueError(f"{len(models)} models do not fit into one chart of {len(COLORS)} colours; report fewer runs")
    columns = [c for c in [*comparison.categories, "average"] if any(row[c] is not None for row in models.values())]
    width = 0.8 / len(models)
    figure = Figure(figsize=(max(7.0, 0.28 * len(columns) * (len(models) + 1.5)), 4.8), layout="constrained")
    axes = figure.subplots()
    for i, (name, averages) in enumerate(models.items()):
        shown = [(x, averages[column]) for x, column in enumerate(columns) if averages[column] is not None]
        places = [x + (i - (len(models) - 1) / 2) * width for x, _ in shown]
        style = {"color": COLORS[i], "hatch": HATCHES[i], "edgecolor": "white", "linewidth": 0}
        bars = axes.bar(places, [score for _, score in shown], width * 0.92, label=name, **style)
        axes.bar_label(bars, fmt="%.1f", rotation=90, padding=3, fontsize=7)
    labels = [_label(column, len(_tasks(comparison.types, column))) for column in columns]
    axes.set_xticks(range(len(columns)), labels, fontsize=9)
    if columns[-1] == "average":
        axes.axvline(len(columns) - 1.5, color="#bbbbbb", linewidth=0.8)
    lowest = min(score for row in models.values() for score in row.values() if score is not None)
    axes.set_ylim(min(0.0, 1.3 * lowest), 112)  # a rank correlation can be negative
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("score, percent")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(3, len(models)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _label(column: str, tasks: int) -> str:
    name = {"PairClassification": "Pair\nclassif.", "Classification": "Classif.", "Summarization": "Summ."}.get(
        column, column
    )
    return f"{name}\n({tasks} task{'s' if tasks > 1 else ''})"


# --- Model card


def card_metadata(run: Run) -> str:
    """The YAML block between a model card's `---` lines: `model-index` with every task, as on the MTEB leaderboard.

    Raises:
        ValueError: the run has no details of its tasks.
    """
    if not run.details:
        raise ValueError(f"{run.name} is a list of scores without data sets; metadata needs a run of run_mteb.py")
    results = eval_results(run.tasks, run.details)
    return ModelCardData(model_name=run.name, eval_results=results, tags=["mteb"]).to_yaml() + "\n"


def write_report(runs: Sequence[Run], output_dir: str) -> Path:
    """Writes report.md, averages.csv, tasks.csv, report.png, and metadata-<model>.yaml for each run of run_mteb.py.

    Raises:
        ValueError: as `compare` and `draw`.
    """
    comparison, folder = compare(runs), Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    draw(comparison, folder / "report.png")
    (folder / "report.md").write_text(markdown_report(comparison), encoding="utf-8")
    (folder / "averages.csv").write_text(csv_table(average_rows(comparison)), encoding="utf-8")
    (folder / "tasks.csv").write_text(csv_table(task_rows(comparison)), encoding="utf-8")
    for run in runs:
        if run.details:
            (folder / f"metadata-{run.name.replace('/', '__')}.yaml").write_text(card_metadata(run), encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of run_mteb.py, or JSON list of scores")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--names", nargs="+", help="what to call the runs, in their order")
    args = parser.parse_args()
    try:
        runs = [read_run(path) for path in args.runs]
        if args.names is not None:
            if len(args.names) != len(runs):
                raise ValueError(f"{len(args.names)} --names for {len(runs)} runs; give each run one")
            for run, name in zip(runs, args.names):
                run.name = name
        folder = write_report(runs, args.output_dir)
    except ValueError as error:
        sys.exit(f"report: {error}")
    print(markdown_table(average_rows(compare(runs))))
    print(f"\nreport.md, report.png, averages.csv, tasks.csv and metadata are in {folder}")


if __name__ == "__main__":
    main()
