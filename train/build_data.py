"""Builds training data: reads every set of a recipe, decontaminates it, mines hard negatives and writes triplets.

python train/build_data.py --recipe train/recipes/paper-data.yaml --output_dir runs/paper-data --tasks 8
python train/build_data.py --list

Run it again to resume. What it writes is described in docs/data.md; training reads it with `data_dir:`.
"""

import re
import sys
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from nvembed.eval.files import claimed, write_json
from nvembed.eval.shards import ExecutorArguments
from nvembed.train.data.build import build, check_is_free, claim_output, teacher_name
from nvembed.train.data.build_settings import BuildSettings, TeacherSettings
from nvembed.train.data.data_page import write_page
from nvembed.train.data.decontaminate import read_rule
from nvembed.train.data.kinds import check_kind
from nvembed.train.data.mining import MiningRules
from nvembed.train.data.sets import as_source, list_sets
from nvembed.train.data.source import check_exists, check_fields, check_keys, check_sources, resolve_entry
from nvembed.train.recipe import find_recipe


RESERVED = ("work", "manifest.json", "DATA.md", "dropped.png")  # of the folder that a build writes
LIBRARIES = ("nvembed", "datasets", "pyarrow", "bm25s", "faiss-cpu", "datatrove", "transformers")


@dataclass
class BuildArguments(ExecutorArguments):
    recipe: str | None = field(
        default=None, metadata={"help": "YAML file, or the name of one that comes with nvembed."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to build in; run again to resume."})
    sets: list[str] | None = field(default=None, metadata={"help": "Of the recipe's sets, build these alone."})
    teacher: str | None = field(
        default=None,
        metadata={"help": "Model that ranks (folder or Hub name); the recipe's other settings of `teacher:` stay."},
    )
    list: bool = field(default=False, metadata={"help": "Print the table of the paper's sets and stop."})


def read_recipe(path: Path, only: list[str] | None = None) -> BuildSettings:
    """A recipe's settings, the paths of its data relative to its folder.

    Raises:
        ValueError: it is not a mapping, has an unknown key, or a value is invalid.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), list):
        raise ValueError(f"{path} has no list `datasets:`")
    check_keys(content, BuildSettings, str(path))
    content = {name: value for name, value in content.items() if value is not None}
    sources = [as_source(resolve_entry(entry, path.parent)) for entry in content["datasets"]]
    for source in sources:
        if source.decontaminate is not None:
            source.decontaminate = resolve_rule(source.decontaminate, path.parent)
            read_rule(source.decontaminate)
    if only is not None:
        if unknown := sorted(set(only) - {source.name for source in sources}):
            raise ValueError(f"--sets {unknown[0]!r} is not in {path}; its sets are {[s.name for s in sources]}")
        sources = [source for source in sources if source.name in only]
    for source in check_sources(sources):
        check_exists(source)
        check_kind(source)
        if not re.fullmatch(r"\w[\w.-]*", source.name) or source.name in RESERVED:
            raise ValueError(
                f"{path}: a set is named {source.name!r}, but its name is that of a folder: use letters, digits, - _ ."
            )
    content["datasets"] = sources
    for name, kind in (("teacher", TeacherSettings), ("mining", MiningRules)):
        if content.get(name) is not None:
            check_keys(content[name], kind, f"{path}: {name}")
            content[name] = kind(**content[name])
    if content.get("decontaminate") is not None:
        content["decontaminate"] = read_rule(resolve_rule(content["decontaminate"], path.parent))
    settings = BuildSettings(**content)
    check_fields(settings, str(path))
    for name in ("num_negatives", "shard_rows", "corpus_shard_rows"):
        value = getattr(settings, name)
        if value < 1:
            raise ValueError(f"{path}: {name} is {value}; it must be 1 or more")
    return settings


def resolve_rule(rule: object, folder: Path) -> object:
    """A decontamination rule with the files that it names found from the recipe's folder."""
    if not isinstance(rule, dict) or not isinstance(rule.get("against"), list):
        return rule  # an error of `read_rule`
    found = [str(folder / name) if (folder / str(name)).is_file() else name for name in rule["against"]]
    return rule | {"against": found}


def run(args: BuildArguments) -> dict:
    """Builds, and writes `manifest.json` and `DATA.md`; returns the manifest.

    Raises:
        ValueError: as `read_recipe`, `TeacherSettings.check`, `claim_output` and `build`; another one runs there.
    """
    if args.recipe is None or args.output_dir is None:
        raise ValueError("--recipe and --output_dir are needed, or --list")
    settings, output = read_recipe(find_recipe(args.recipe), args.sets), Path(args.output_dir)
    if args.teacher is not None:
        # A branch of the recipe's model, and trust in its code, say nothing of another's.
        settings.teacher = replace(settings.teacher, model=args.teacher, revision=None, trust_remote_code=False)
    settings.teacher.check()
    check_is_free(output)
    with claimed(output / "work", "build_data.py"):
        claim_output(settings, output)
        sets = build(settings, output, args)
        manifest = {
            "num_negatives": settings.num_negatives,
            "seed": settings.seed,
            "teacher": teacher_name(settings.teacher),
            "mining": asdict(settings.mining),
            "sets": sets,
            "libraries": {name: version(name) for name in LIBRARIES},
        }
        write_page(sets, manifest, output)
        write_json(output / "manifest.json", manifest)
    return manifest


def main() -> None:
    try:
        (args,) = HfArgumentParser(BuildArguments, description=__doc__).parse_args_into_dataclasses()
        if args.list:
            print(list_sets())
            return
        manifest = run(args)
    except ValueError as error:
        sys.exit(f"build_data: {error}")
    triplets = sum(one["counts"]["mine"]["triplets"] for one in manifest["sets"].values())
    print(f"{triplets:,} triplets of {len(manifest['sets'])} sets in {args.output_dir}; look at its DATA.md")


if __name__ == "__main__":
    main()
