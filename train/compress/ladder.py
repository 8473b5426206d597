"""Runs a recipe's ladder, prune -> distil -> quantize, and measures what each step costs and saves.

    python train/compress/ladder.py compress
    python train/compress/ladder.py my-ladder.yaml --dry_run

Every step is the command that one would run by hand, with the settings under its name in the recipe. A step that is
done is not run again, a training that was stopped goes on, and tasks that were measured are kept. `ladder:` in the
recipe holds `output_dir`, the `steps`, the `tasks` to measure, their `max_length`, and the `rounds` of measuring speed.
Writes LADDER.md, ladder.json and ladder.png there: score, bytes on disk, memory and texts per second of the checkpoint
that the ladder starts from and of each step's.
"""

import argparse
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from nvembed.eval.commands import (
    ROOT,
    SCRIPTS,
    as_typed,
    errors_in_one_line,
    known_options,
    make_checkpoint,
    recipe_settings,
    run,
    score,
)
from nvembed.eval.files import write_json
from nvembed.eval.markdown_table import markdown_table
from nvembed.eval.models import digest_model, find_config
from nvembed.eval.tasks.lookup import select_tasks
from nvembed.train.recipe import find_recipe


OPTIONS = ("output_dir", "steps", "tasks", "max_length", "rounds")  # of the recipe's section `ladder`
STEPS = ("prune", "stage2", "distill", "quantize")


@dataclass
class Ladder:
    """A recipe's ladder.

    Args:
        recipe: its file.
        start: the checkpoint that the first step begins with.
        steps: step -> the folder that it writes.
        output_dir: for the results.
        tasks: what `eval/run_mteb.py` takes.
        max_length: tokens of a text there.
        rounds: how often size and speed are measured.
    """

    recipe: Path
    start: str
    steps: dict[str, Path]
    output_dir: Path
    tasks: list[str]
    max_length: int
    rounds: int

    @classmethod
    def read(cls, name: str) -> "Ladder":
        """
        Raises:
            ValueError: there is no such recipe, it lacks a setting, or a step does not begin with what the one before
                it wrote.
        """
        file = find_recipe(name)
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        try:
            ladder = recipe["ladder"]
            steps = {step: recipe[step]["output_dir"] for step in ladder["steps"]}
            begins = {step: recipe[step]["model_name_or_path"] for step in steps}
            output_dir, tasks = Path(ladder["output_dir"]), ladder["tasks"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} lacks {error} for a ladder; see train/recipes/compress.yaml") from None
        if unknown := [step for step in steps if step not in STEPS]:
            raise ValueError(f"{file}: there is no step {unknown[0]!r}; the steps are {', '.join(STEPS)}")
        before = None
        for step, folder in steps.items():
            if before is not None and begins[step] != before:
                raise ValueError(f"{file}: {step} begins with {begins[step]}, and the step before writes {before}")
            before = folder
        if unknown := ladder.keys() - OPTIONS:
            raise ValueError(f"{file}: ladder has an unknown key {min(unknown)!r}; it has {', '.join(OPTIONS)}")
        tasks = [tasks] if isinstance(tasks, str) else tasks
        tasks = [str(file.parent / task) if (file.parent / task).is_file() else task for task in tasks]
        paths = {step: Path(folder) for step, folder in steps.items()}
        options = ladder.get("max_length", 512), ladder.get("rounds", 3)
        return cls(file, next(iter(begins.values())), paths, output_dir, tasks, *options)

    @property
    def rungs(self) -> dict[str, str]:
        """The checkpoints to measure by name."""
        return {"start": self.start} | {step: str(folder) for step, folder in self.steps.items()}


def check(ladder: Ladder) -> None:
    """Finds before anything runs what would end the ladder after hours.

    Raises:
        ValueError: a step has an option that its script does not know, there is no such checkpoint to start from, or no
            such tasks.
    """
    for step in ladder.steps:
        if unknown := recipe_settings(ladder.recipe, step).keys() - known_options(SCRIPTS[step]):
            raise ValueError(f"{ladder.recipe}: {SCRIPTS[step]} has no option {min(unknown)!r}; see its --help")
    find_config(ladder.start, None)
    if not Path(ladder.start).is_dir():
        raise ValueError(
            f"{ladder.start} is a name on the Hub, and what a rung takes on disk is measured of a folder: download it "
            f"(hf download {ladder.start} --local-dir FOLDER) and name the folder"
        )
    select_tasks(ladder.tasks)


def describe_step(recipe: Path, step: str, begins_with: str) -> dict:
    """What decides a step's result: its settings in a recipe and the common ones, and the checkpoint it begins with."""
    begin = digest_model(Path(begins_with)) if Path(begins_with).is_dir() else begins_with
    settings = recipe_settings(recipe, step).items()
    return {name: value for name, value in settings if name != "output_dir"} | {"begins with": begin}


def run_ladder(ladder: Ladder) -> list[dict]:
    """Runs and measures the steps that are missing; returns one entry a rung.

    Raises:
        ValueError: a step's folder was made with other settings.
        subprocess.CalledProcessError: a step failed.
    """
    begin = ladder.start
    for step, folder in ladder.steps.items():
        made_of = describe_step(ladder.recipe, step, begin)
        make_checkpoint(folder, SCRIPTS[step], ["--config", str(ladder.recipe)], made_of)
        begin = str(folder)
    results = []
    for name, checkpoint in ladder.rungs.items():
        options = ("--max_length", str(ladder.max_length))
        scores = score(checkpoint, ladder.tasks, ladder.output_dir / "scores" / name, *options)
        results.append({"rung": name, "checkpoint": checkpoint, "scores": scores})
    rounds = ("--rounds", str(ladder.rounds))
    costs = run(str(ROOT / "eval/speed/checkpoints.py"), *ladder.rungs.values(), *rounds).splitlines()
    for result, cost in zip(results, map(json.loads, costs), strict=True):
        result |= {name: value for name, value in cost.items() if name != "checkpoint"}
    return results


def table(results: list[dict]) -> str:
    names = ["average", *(name for name in results[0]["scores"] if name != "average")]
    costs = ["MB on disk", "MB of weights", "MB at the peak", "texts/s"]
    rows = [["step", *names, *costs]]
    for result in results:
        sizes = [1000 * result[name] for name in ("disk_gb", "weights_gb", "peak_gb")]
        shown = [f"{result['scores'][name]:.2f}" for name in names] + [f"{size:,.0f}" for size in sizes]
        rows.append([result["rung"], *shown, f"{result['texts_per_second']:.1f}"])
    return markdown_table(rows, 1)


def draw(results: list[dict], path: Path) -> None:
    """Score and size of each rung, one picture."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [result["rung"] for result in results]
    for axes, values, title, spelled in (
        (left, [result["scores"]["average"] for result in results], "average score, %", "{:.1f}"),
        (right, [1000 * result["disk_gb"] for result in results], "MB on disk", "{:.0f}"),
    ):
        bars = axes.bar(names, values, color="#4477aa", width=0.6)
        axes.bar_label(bars, [spelled.format(value) for value in values], padding=2, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.15 * max(values))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with nvembed")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    args = parser.parse_args()
    ladder = Ladder.read(args.recipe)
    check(ladder)
    if args.dry_run:
        for step in ladder.steps:
            print(as_typed(SCRIPTS[step], "--config", str(ladder.recipe)))
        return
    results = run_ladder(ladder)
    write_json(ladder.output_dir / "ladder.json", results)
    draw(results, ladder.output_dir / "ladder.png")
    text = table(results)
    (ladder.output_dir / "LADDER.md").write_text(
        f"# Ladder of {ladder.recipe.name}, {date.today()}\n\n{text}\n\n![Score and size](ladder.png)\n",
        encoding="utf-8",
    )
    print(text)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
