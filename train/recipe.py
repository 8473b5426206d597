"""Recipes: the settings of one step or of several in a YAML file, under those of the command line."""

import sys
from collections.abc import Iterable
from pathlib import Path

from trl import TrlParser

from nvembed.eval.commands import SCRIPTS, STAGES
from nvembed.train.data.source import resolve_entry


class RecipeParser(TrlParser):
    """`TrlParser` for recipes: YAML files, by path or, for those that come with nvembed, by name.

    A recipe may hold several steps: keys under `stage1:` or `prune:` override those at the top level. Which of them is
    read follows from the dataclass that has a `stage`. Relative paths of data start at the recipe's folder.
    """

    def __init__(self, *dataclass_types: type):
        self.stage = next(group.stage for group in dataclass_types if hasattr(group, "stage"))
        super().__init__(dataclass_types)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **options) -> tuple:
        args = [part for arg in (sys.argv[1:] if args is None else args) for part in _split_config(arg)]
        if "--no_in_batch_negatives" in args:  # which it was while the option was true or false
            raise ValueError("--no_in_batch_negatives is now --in_batch_negatives false")
        if args.count("--config") > 1:
            raise ValueError(
                "--config is given more than once; a run has one recipe, whose settings other options override"
            )
        place = args.index("--config") + 1 if "--config" in args else len(args)
        if args[-1:] == ["--config"]:
            raise ValueError("--config is the last argument; name a recipe after it")
        if place < len(args):
            self.recipe = find_recipe(args[place])
            args[place] = str(self.recipe)
        return super().parse_args_and_config(args, **options)

    def set_defaults_with_config(self, **config) -> list[str]:
        parts = {name: config.pop(name) for name in STAGES if name in config}
        for name, part in parts.items():
            if not isinstance(part, dict):
                raise ValueError(f"{name} is {part!r} in the recipe; it must be a mapping of that stage's settings")
        if parts and self.stage not in parts:
            run = SCRIPTS[next(iter(parts))]
            raise ValueError(f"the recipe has {', '.join(parts)} and no {self.stage}: run {run}")
        config |= parts.get(self.stage, {})
        if isinstance(config.get("datasets"), (list, dict, str)):
            entries = config["datasets"] if isinstance(config["datasets"], list) else [config["datasets"]]
            config["datasets"] = [resolve_entry(entry, self.recipe.parent) for entry in entries]
        if isinstance(config.get("eval_tasks"), str):
            config["eval_tasks"] = str(self.recipe.parent / Path(config["eval_tasks"]).expanduser())
        return super().set_defaults_with_config(**config)


def _split_config(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of one that comes with nvembed.

    Raises:
        ValueError: it is neither.
    """
    if Path(name).is_file():
        return Path(name).absolute()
    folder = Path(__file__).with_name("recipes")
    if (folder / f"{name}.yaml").is_file():
        return folder / f"{name}.yaml"
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.endswith("-tasks")))
    raise ValueError(f"--config {name} is neither a file nor the name of a recipe; the recipes are {known}")
