"""A checkpoint's certificate: what each of its stages was trained on, with digests, counts and decontamination."""

import json
from collections.abc import Sequence
from pathlib import Path

from nvembed.eval.files import sha256, write_json
from nvembed.eval.training_data import FILE, read_training_data
from nvembed.train.data.blend import Blend
from nvembed.train.data.sets import known_sets
from nvembed.train.data.source import DatasetSource, could_be_hub_name


def certify(
    stage: str,
    base: str,
    sources: Sequence[DatasetSource],
    made_of: dict | None,
    blend: Blend,
    samples: Sequence[int],
    revision: str | None = None,
) -> dict:
    """The base's stages, and this one; "complete" if the base's certificate is, from the decoder on.

    Args:
        stage: name of the script.
        base: the checkpoint it started from, with its own certificate if it has one.
        made_of: `nvembed.train.data.prepared.read_provenance` of the run's triplets.
        samples: triplets trained on per source, repetitions included.
        revision: of the base on the Hub.
    """
    provenance = {} if made_of is None else {one["name"]: one for one in made_of["datasets"]}
    sets = []
    for source, table, count in zip(sources, blend.tables, samples, strict=True):
        is_local, built = Path(source.path).exists(), find_build(source)
        known = {
            "name": source.name,
            "source": None if is_local else source.path,
            "config": source.config,
            "split": source.split,
            "set": source.set,
            "mteb": sorted(mteb_names(source, built)),
            "triplets": len(table),
            "trained_on": count,
            "sha256": provenance.get(source.name, {}).get("files", {}),
        }
        if built is not None:
            known["build"] = built
        sets.append(known)
    before = read_training_data(base, revision)
    known = {"complete": False, "base": base_name(base), "stages": []} if before is None else before
    return known | {"stages": [*known["stages"], {"stage": stage, "sets": sets}]}


def with_teacher(certificate: dict, teacher: str, revision: str | None) -> dict:
    """A distilled student's certificate: what its teacher was trained on has been seen, too, at second hand."""
    known = read_training_data(teacher, revision) or {"complete": False, "base": base_name(teacher), "stages": []}
    *before, last = certificate["stages"]
    taught = [stage | {"stage": f"{stage['stage']} of the teacher"} for stage in known["stages"] if stage not in before]
    last = last | {"teacher": {"name": base_name(teacher), "base": known["base"]}}
    return certificate | {
        "complete": certificate["complete"] and bool(known.get("complete")),
        "stages": [*before, *taught, last],
    }


def base_name(base: str) -> str:
    return Path(base).resolve().name if Path(base).exists() else base


def untrained(decoder: str) -> dict:
    """The certificate of a checkpoint made from a decoder: no embedding training yet, and all that follows is known."""
    return {"complete": True, "base": base_name(decoder), "stages": []}


def mteb_names(source: DatasetSource, built: dict | None) -> set[str]:
    """The tasks of mteb whose training data a source is: its entry's, those of its set, and those it was built with."""
    of_set = known_sets()[source.set].mteb if source.set is not None else None
    return {*(source.mteb or ()), *(of_set or ()), *([] if built is None else built["source"].get("mteb", []))}


def find_build(source: DatasetSource) -> dict | None:
    """What the manifest of `build_data.py` says of a source in its folder: where it came from, and its counts.

    No path of the machine that built it is in it, since checkpoints are pushed.
    """
    manifest = Path(source.path).absolute().parent / "manifest.json"
    if not Path(source.path).is_dir() or not manifest.is_file():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        one = content["sets"][Path(source.path).name]
        origin = {name: one["source"][name] for name in ("path", "set", "config", "mteb") if one["source"].get(name)}
        known = {"counts": one["counts"], "decontaminate": one.get("decontaminate", []), "files": one["files"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # another tool's manifest
    if not could_be_hub_name(origin.get("path", "")):
        origin.pop("path", None)
    return {"source": origin, **known, "manifest_sha256": sha256(manifest)}


def copy_certificate(base: str, revision: str | None, folder: Path) -> None:
    """Passes a checkpoint's certificate on to one made from it without training."""
    known = read_training_data(base, revision)
    if known is not None:
        write_certificate(folder, known)


def merged_certificate(models: Sequence[str]) -> dict:
    """What any of several checkpoints was trained on, for one made from all of them."""
    known = [read_training_data(name) or {"complete": False, "base": base_name(name), "stages": []} for name in models]
    stages = []
    for certificate in known:
        stages += [stage for stage in certificate["stages"] if stage not in stages]
    return known[0] | {"complete": all(one.get("complete", False) for one in known), "stages": stages}


def write_certificate(folder: Path, certificate: dict) -> None:
    write_json(folder / FILE, certificate)
