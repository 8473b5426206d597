"""Reruns the paper's comparisons, or yours, on your base and within your budget.

    python eval/ablate.py poolings --output_dir runs/poolings --dry_run
    python eval/ablate.py poolings --output_dir runs/poolings
    python eval/ablate.py my-grid.yaml --output_dir runs/mine --jobs 4 --page ABLATIONS.md

A grid is a YAML file: a recipe, axes of overrides, seeds, tasks (see `eval/ablations/`). Each run is the commands that
one would type: train/init_checkpoint.py, the stages, eval/run_mteb.py; runs that begin alike share their first steps.
Every result is saved as soon as it is there; to resume a stopped grid, run the same command. A run that fails is named
below the table, and the others go on. `--report_only` writes what there is so far, also while the grid runs.
"""

import argparse
import shlex
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from nvembed.eval.ablation.grid import Grid, check_options
from nvembed.eval.ablation.page import draw, put_section, section, write_scores
from nvembed.eval.ablation.runner import (
    Results,
    Runner,
    check_jobs,
    estimate,
    open_results,
    visible_devices,
)
from nvembed.eval.commands import errors_in_one_line
from nvembed.eval.files import claimed, locked, write_text
from nvembed.eval.markdown_table import markdown_table


def print_plan(grid: Grid, runner: Runner) -> None:
    for name, lines in runner.commands().items():
        print(f"\n# {name}", *lines, sep="\n")
    rows, hours, is_known = [["step", "runs", "minutes each", "hours"]], 0.0, True
    for name, count, minutes in estimate(grid, runner.results):
        figures = ["?", "?"] if minutes is None else [f"{minutes:.1f}", f"{count * minutes / 60:.1f}"]
        rows.append([name, str(count), *figures])
        hours += count * (minutes or 0) / 60
        is_known = is_known and minutes is not None
    print(f"\n{markdown_table(rows, 1)}")
    at_least = "" if is_known else "at least "
    print(f"\nStill to run: {at_least}{hours / runner.jobs:.1f} hours, {runner.jobs} at a time")


def ablate(args: argparse.Namespace) -> int:
    """Runs, or plans, a grid; returns how many runs failed."""
    check_jobs(args.jobs)
    grid, folder = Grid.read(args.grid), Path(args.output_dir)
    if args.seeds is not None:
        grid.seeds = args.seeds
        grid.check()  # cells that differ by seed alone may be the same now
    if args.use_gpu:
        if not (args.dry_run or args.report_only or visible_devices()):
            raise ValueError("--use_gpu is set and there is no GPU that torch can use; leave it out")
        grid.train_on_gpu()
    check_options(grid)
    if args.dry_run:
        print_plan(grid, Runner(grid, folder, open_results(grid, folder, args.mix_revisions), args.jobs))
        return 0
    if args.report_only:
        return report(grid, folder, args)
    with claimed(folder, "ablate.py"):
        results = open_results(grid, folder, args.mix_revisions)
        runner = Runner(grid, folder, results, args.jobs)
        lines = [line for name, own in runner.commands().items() for line in (f"# {name}", *own)]
        write_text(folder / f"{grid.file.stem}.commands.txt", "\n".join(lines) + "\n")
        runner.run()
        with reporting(folder):
            write(grid, results, folder, args)
    return len(results.failures(grid))


def report(grid: Grid, folder: Path, args: argparse.Namespace) -> int:
    """Writes what has been measured, by whatever code, also while the grid runs; returns how many runs have failed."""
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: run {args.grid} without --report_only")
    with reporting(folder):
        results = open_results(grid, folder, mix_revisions=True, to_report=True)
        if not any(run.key in results.scores for run in grid.runs()):
            raise ValueError(
                f"{folder} has no scores of {args.grid} with these options: give the --seeds and --use_gpu that it ran "
                "with, or run it without --report_only"
            )
        write(grid, results, folder, args)
    return len(results.failures(grid))


def reporting(folder: Path) -> AbstractContextManager:
    """Has two processes write a grid's section one after the other."""
    return locked(folder, lambda: None, ".report.lock")


def write(grid: Grid, results: Results, folder: Path, args: argparse.Namespace) -> None:
    """Writes section, chart and scores into the folder and, if named, into and beside a page; prints the section."""
    command = ["python", "eval/ablate.py", args.grid, "--output_dir", args.output_dir]
    command += ["--seeds", *map(str, args.seeds)] if args.seeds is not None else []
    command += ["--jobs", str(args.jobs)] if args.jobs > 1 else []
    command += ["--use_gpu"] if args.use_gpu else []
    command += ["--mix_revisions"] if args.mix_revisions else []
    command = shlex.join(command + (["--page", args.page] if args.page is not None else []))
    name = grid.file.stem  # a folder may hold several grids
    text = section(grid, results, Path(), command)
    write_text(folder / f"{name}.md", text)
    print(text)
    beside = Path("ablations")  # the page
    for one in [folder] if args.page is None else [folder, Path(args.page).parent / beside]:
        draw(grid, results, one / f"{name}.png")
        write_scores(grid, results, one / f"{name}.csv")
    if args.page is not None:
        put_section(Path(args.page), name, section(grid, results, beside, command))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="a YAML file, or the name of a grid that comes with nvembed")
    parser.add_argument("--output_dir", required=True, help="folder for checkpoints, scores and the page's section")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with a share of the cores")
    parser.add_argument("--use_gpu", action="store_true", help="train on GPUs even where the recipe sets use_cpu")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the grid's")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry_run", action="store_true", help="print the commands and how long they would take")
    instead.add_argument("--report_only", action="store_true", help="run nothing, and write what has been measured")
    parser.add_argument("--page", help="Markdown file to write the section into")
    parser.add_argument("--mix_revisions", action="store_true", help="go on with results that other code has made")
    with errors_in_one_line():
        failed = ablate(parser.parse_args())
    if failed:
        sys.exit(f"ablate: {failed} runs failed; the table names them")


if __name__ == "__main__":
    main()
