"""Finds a grid's YAML file and those that it names, and reads it with what it inherits (`like`)."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from nvembed.eval.commands import ROOT, recipe_settings


KEYS = {
    "title", "caption", "recipe", "start", "steps", "options", "axes", "seeds", "tasks", "max_length", "dtype",
    "minutes", "paper", "claims", "merge_seeds", "zero_shot", "like",
}  # fmt: skip
PARTS = ("-tasks", "-recipe", "-common")  # names of files beside the grids that are parts of them
SETTINGS = ("recipe", "start", "steps", "options", "seeds", "tasks", "max_length", "dtype", "minutes")  # for `like`


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def mapping(value: object, name: str) -> dict:
    """The value, if it is a mapping.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}; it must be a mapping")
    return value


def read_content(file: Path, likened: tuple[Path, ...] = ()) -> dict:
    """The keys of a grid's file, with those that it inherits (`like`), and paths that hold everywhere.

    Beside them `inherited`: the steps whose options are another grid's alone, so that this one need not run them.

    Args:
        likened: the files that inherit from this one.

    Raises:
        ValueError: it cannot be read, has an unknown key or one without a value, or inherits from itself.
    """
    if file in likened:
        chain = " -> ".join(one.name for one in (*likened, file))
        raise ValueError(f"{likened[-1]}: like goes round: {chain}; name another file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no mapping; see eval/ablations/ for grids")
    if unknown := content.keys() - KEYS:
        raise ValueError(f"{file}: {min(unknown)} is unknown; keys are {', '.join(sorted(KEYS))}")
    if empty := [key for key, value in content.items() if value is None or key in SETTINGS and value == []]:
        raise ValueError(f"{file}: {empty[0]} is empty; give it a value, or leave it out")
    if "recipe" in content:
        content["recipe"] = find_file(file, content["recipe"])
    if "tasks" in content:
        content["tasks"] = [
            str(find_file(file, task)) if str(task).endswith((".yaml", ".yml")) else str(task)
            for task in as_list(content["tasks"])
        ]
    content["options"], content["inherited"] = mapping(content.get("options", {}), f"{file}: options"), set()
    for step, options in content["options"].items():
        mapping(options, f"{file}: options: {step}")
    if "like" in content:
        base = read_content(find_like(file, content.pop("like")), (*likened, file.resolve()))
        content = {key: base[key] for key in SETTINGS if key in base} | content
        own = {step: base["options"].get(step, {}) | options for step, options in content["options"].items()}
        content["inherited"] = base["options"].keys() - own.keys()
        content["options"] = base["options"] | own
    return content


def settings_digest(recipe: Path, step: str) -> str:
    """Of what a recipe sets for a step; comments and other steps' settings do not change it.

    Raises:
        ValueError: the recipe cannot be read.
    """
    folder = os.path.relpath(recipe.parent, ROOT)  # where the paths of its data start
    settings = json.dumps([recipe_settings(recipe, step), folder], default=str)
    return hashlib.sha256(settings.encode()).hexdigest()


def find_grid(path: str) -> Path:
    """A grid's file: a path, or the name of one that comes with nvembed.

    Raises:
        ValueError: it is neither.
    """
    own = Path(__file__).parents[1] / "ablations" / f"{path}.yaml"
    if Path(path).is_file():
        return Path(path).absolute()
    if own.is_file():
        return own
    known = ", ".join(sorted(file.stem for file in own.parent.glob("*.yaml") if not file.stem.endswith(PARTS)))
    raise ValueError(f"{path} is neither a file nor the name of a grid; the grids are {known}")


def find_like(beside: Path, name: object) -> Path:
    """The file that a grid inherits from: one beside it, or a grid that comes with nvembed.

    Raises:
        ValueError: there is none.
    """
    file = beside.parent / Path(str(name)).expanduser()
    try:
        return (file if file.is_file() else find_grid(str(name))).resolve()
    except ValueError as error:
        raise ValueError(f"{beside}: like: {error}") from None


def find_file(beside: Path, name: str) -> Path:
    """A file relative to the folder of another, or a recipe by its name.

    Raises:
        ValueError: there is none.
    """
    for path in (beside.parent / Path(name).expanduser(), ROOT / "train/recipes" / f"{name}.yaml"):
        if path.is_file():
            return path.resolve()
    raise ValueError(f"{beside} names {name}, which is neither a file beside it nor a recipe that comes with nvembed")


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
