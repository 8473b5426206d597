"""Compares ways to prune: methods x patterns, as pruned, retrained, and retrained by the dense model.

python train/compress/grid.py compress --output_dir runs/compress/grid --tasks quick.yaml [--seeds 42 43 44]

Each cell is what the scripts make with the recipe's sections `prune`, `stage2` and `distill` and the cell's method,
pattern and seed in place of theirs. A stopped grid goes on where it stopped; every cell's scores are kept in
`output_dir`. Prints a Markdown table: mean and, of several seeds, standard deviation.
"""

import argparse
import statistics
from itertools import product
from pathlib import Path

import yaml

from nvembed.eval.commands import SCRIPTS, errors_in_one_line, make_checkpoint, score
from nvembed.eval.files import write_json
from nvembed.eval.markdown_table import markdown_table
from nvembed.train.compress.ladder import describe_step
from nvembed.train.compress.solvers import METHODS
from nvembed.train.recipe import find_recipe


ARMS = {"retrained": "stage2", "distilled": "distill"}  # and their steps


def fill(args: argparse.Namespace, recipe: Path) -> dict[str, list[float]]:
    """Makes and measures every cell; returns the average scores of its seeds by cell."""
    folder, cells = Path(args.output_dir), {}
    config = ["--config", str(recipe)]
    options = ("--max_length", str(args.max_length), "--dtype", args.dtype)
    dense = yaml.safe_load(recipe.read_text(encoding="utf-8"))["prune"]["model_name_or_path"]

    def measure(name: str, checkpoint: str) -> float:
        scores = score(checkpoint, args.tasks, folder / "scores" / name, *options)
        write_json(folder / f"{name}.scores.json", scores)
        return scores["average"]

    of_pruning = describe_step(recipe, "prune", dense)
    cells["dense"] = [measure("dense", dense)]
    for method, pattern in product(args.methods, args.patterns):
        name = f"{method}-{pattern.replace(':', '-')}"
        cell = ["--method", method, "--pattern", pattern, "--drop_latent_attention", "false"]
        make_checkpoint(folder / name, SCRIPTS["prune"], [*config, *cell], of_pruning)
        cells[f"{method} {pattern} pruned"] = [measure(name, str(folder / name))]
    for seed, (method, pattern), arm in product(args.seeds, product(args.methods, args.patterns), args.arms):
        pruned = f"{method}-{pattern.replace(':', '-')}"
        name = f"{pruned}-{arm}-{seed}"
        cell = ["--model_name_or_path", str(folder / pruned), "--seed", str(seed)]
        made_of = describe_step(recipe, ARMS[arm], str(folder / pruned))
        make_checkpoint(folder / name, SCRIPTS[ARMS[arm]], [*config, *cell], made_of)
        cells.setdefault(f"{method} {pattern} {arm}", []).append(measure(name, str(folder / name)))
    return cells


def table(cells: dict[str, list[float]], methods: list[str], patterns: list[str], arms: list[str]) -> str:
    rows = [["method", "pattern", "pruned", *arms]]
    for method, pattern in product(methods, patterns):
        found = [cells[f"{method} {pattern} {arm}"] for arm in ("pruned", *arms)]
        rows.append([method, pattern, *map(shown, found)])
    return f"dense: {shown(cells['dense'])}\n\n{markdown_table(rows, 2)}"


def shown(scores: list[float]) -> str:
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with nvembed")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--tasks", nargs="+", required=True, help="as eval/run_mteb.py takes them")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "4:8", "2:4"])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    cells = fill(args, find_recipe(args.recipe))
    text = table(cells, args.methods, args.patterns, args.arms)
    write_json(Path(args.output_dir, "grid.json"), cells)
    Path(args.output_dir, "GRID.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
