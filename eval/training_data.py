"""What a checkpoint was trained on, as it says itself, and which tasks that makes seen rather than zero-shot."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from mteb.abstasks import AbsTask
from mteb.models.model_meta import ModelMeta
from transformers.utils import cached_file


FILE = "training_data.json"  # in a checkpoint's folder; `nvembed.train.certificate` writes it
SEEN = "seen"  # a mark of a score; the others need no name


def read_training_data(model: str, revision: str | None = None) -> dict | None:
    """The certificate of a checkpoint, local or on the Hub; None if it has none.

    Raises:
        ValueError: it is not one.
    """
    try:
        path = cached_file(model, FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        trained_on(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not say what the model was trained on ({error!r}); remove it") from None
    return content


def trained_on(certificate: Mapping) -> set[str]:
    """Names of all data sets of all stages: their own, and the tasks of mteb whose training data they are."""
    sets = [one for stage in certificate["stages"] for one in stage["sets"]]
    return {name for one in sets for name in (one["name"], *one["mteb"])}


def training_datasets(certificate: Mapping) -> set[str]:
    """mteb's names alone: the `training_datasets` of a `ModelMeta`."""
    return {name for stage in certificate["stages"] for one in stage["sets"] for name in one["mteb"]}


def is_seen(task: AbsTask, certificate: Mapping | None) -> bool | None:
    """Whether training data of the task's own set, or of one that mteb counts as similar, was trained on.

    A local task counts as seen if a set of its name was trained on. None if it was not, as far as is known, but the
    certificate does not reach back to the decoder.
    """
    if certificate is None:
        return None
    if task.metadata.name in trained_on(certificate):
        return True
    meta = ModelMeta.create_empty({"training_datasets": training_datasets(certificate)})
    if meta.is_zero_shot_on([task]) is False:
        return True
    return False if certificate.get("complete") else None


def is_seen_by_any(task: AbsTask, certificates: Iterable[Mapping | None]) -> bool | None:
    """As `is_seen`, of a score that several models made: zero-shot only if it is so for each."""
    seen = {is_seen(task, certificate) for certificate in certificates}
    return True if True in seen else None if None in seen else False


def mark(seen: bool | None) -> str:
    return {True: SEEN, False: "zero-shot", None: "-"}[seen]
