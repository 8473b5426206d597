"""A checkpoint's certificate: what each of its stages was trained on, with digests, counts and decontamination."""

import json
from collections.abc import Sequence
from pathlib import Path

from nvembed.eval.files import sha256, write_json
from nvembed.eval.training_data import FILE, read_training_data
from nvembed.train.data.blend import Blend
from nvembed.train.data.sets import known_sets
from nvembed.train.data.source import DatasetSource


def certify(
    stage: str, base: str, sources: Sequence[DatasetSource], made_of: dict | None, blend: Blend, samples: Sequence[int]
) -> dict:
    """The base's stages, and this one.

    Args:
        stage: name of the script.
        base: the checkpoint it started from, with its own certificate if it has one.
        made_of: `nvembed.train.data.prepared.read_provenance` of the run's triplets.
        samples: triplets trained on per source, repetitions included.
    """
    provenance = {} if made_of is None else {one["name"]: one for one in made_of["datasets"]}
    sets = []
    for source, table, count in zip(sources, blend.tables, samples, strict=True):
        is_local = Path(source.path).exists()
        known = {
            "name": source.name,
            "source": None if is_local else source.path,
            "config": source.config,
            "split": source.split,
            "set": source.set,
            "mteb": mteb_names(source),
            "triplets": len(table),
            "trained_on": count,
            "sha256": provenance.get(source.name, {}).get("files", {}),
        }
        if (built := find_build(source)) is not None:
            known["build"] = built
        sets.append(known)
    before = read_training_data(base)
    earlier = [] if before is None else before["stages"]
    return {"stages": [*earlier, {"stage": stage, "sets": sets}]}


def mteb_names(source: DatasetSource) -> list[str]:
    """The tasks of mteb whose training data a source is: its entry's, those of its set, or those it was built with."""
    if source.mteb is not None:
        return source.mteb
    if source.set is not None:
        return known_sets()[source.set].mteb or []
    built = find_build(source)
    return [] if built is None else built["source"].get("mteb", [])


def find_build(source: DatasetSource) -> dict | None:
    """What the manifest of `build_data.py` says of a source in its folder: where it came from, and its counts."""
    manifest = Path(source.path).absolute().parent / "manifest.json"
    if not Path(source.path).is_dir() or not manifest.is_file():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        one = content["sets"][Path(source.path).name]
    except (ValueError, KeyError, TypeError):
        return None  # another tool's manifest
    return {
        "source": {
            name: one["source"].get(name) for name in ("path", "set", "config", "mteb") if one["source"].get(name)
        },
        "counts": one["counts"],
        "files": one["files"],
        "manifest_sha256": sha256(manifest),
    }


def write_certificate(folder: Path, certificate: dict) -> None:
    write_json(folder / FILE, certificate)
