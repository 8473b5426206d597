"""Checkpoint folders: none is overwritten, none is left half-written."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.logging import get_logger

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.modeling_nvembed import NVEmbedModel, check_tensors


logger = get_logger(__name__)

# What `save_pretrained` writes; a folder that holds any of it is somebody's checkpoint.
PATTERNS = ("config*.json", "modules.json", "*.safetensors", "*.bin", "tokenizer*", "*_nvembed.py")
CARD = "README.md"
INDEX = "model.safetensors.index.json"


def check_output_dir(output_dir: str) -> Path:
    """Raises if the folder holds a checkpoint already; call it before any long work.

    Raises:
        FileExistsError: files of a checkpoint are there, or a README.md.
        NotADirectoryError: the path is a file.
        PermissionError: nothing can be written there.
    """
    folder = Path(output_dir).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder as --output_dir")
    found = sorted(path.name for pattern in PATTERNS for path in folder.glob(pattern))
    if found:
        raise FileExistsError(
            f"{folder} already holds a checkpoint ({found[0]}); name another --output_dir or move it away"
        )
    if (folder / CARD).exists():
        raise FileExistsError(f"{folder / CARD} would be replaced; move it away or name another folder")
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{folder} cannot be written: no write permission for {nearest}; name another --output_dir"
        )
    return folder


@contextmanager
def staged(output_dir: str) -> Iterator[Path]:
    """A folder to write to, moved to `output_dir` when all is written: a folder with a `config.json` is whole.

    Raises:
        FileExistsError: the folder holds a checkpoint already, or a file that would be replaced, such as a README.md.
    """
    folder = check_output_dir(output_dir)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield partial
        for file in partial.iterdir():
            if (folder / file.name).exists():
                raise FileExistsError(f"{folder / file.name} would be replaced; move it away or name another folder")
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # config.json last
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for path in missing:  # of a failed attempt, not even empty folders stay
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def write_checkpoint(model: NVEmbedModel, output_dir: str, write_card: Callable[[Path], None] | None = None) -> None:
    """Saves the model.

    Args:
        write_card: adds a model card to the folder that it is given; see `add_card`.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
        ValueError: a weight is not finite, or what was written has other tensors than its config asks for.
    """
    check_output_dir(output_dir)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, nothing is saved; training needs a lower learning_rate")
    with staged(output_dir) as partial:
        model.save_pretrained(partial)
        check_weights(partial, tensors_of(NVEmbedConfig.from_pretrained(partial)))  # it loads, or it is not there
        add_card(partial, write_card)


def add_card(folder: Path, write_card: Callable[[Path], None] | None) -> None:
    """Calls `write_card`, if given. Errors are logged, not raised: weights without a card are worth keeping."""
    try:
        if write_card is not None:
            write_card(folder)
    except Exception:
        logger.exception("No model card could be written; the weights are saved without one")


def tensors_of(config: NVEmbedConfig) -> dict[str, list[int]]:
    """Names and shapes of a checkpoint's tensors."""
    with torch.device("meta"):
        model = NVEmbedModel(config)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def check_weights(folder: Path, expected: dict[str, list[int]]) -> list[Path]:
    """The safetensors files of a checkpoint, whose headers hold exactly the tensors `expected`, by name and shape.

    Raises:
        ValueError: a file is absent or damaged, a tensor is missing, unknown or of another shape.
    """
    names = ["model.safetensors"]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is cut off or damaged ({error!r}); download it again") from error
    found = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                found |= {key: file.get_slice(key).get_shape() for key in list(file.keys())}
        except FileNotFoundError:
            raise ValueError(f"{folder / name} is absent; download it") from None
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is cut off or damaged ({error}); download it again") from error
    shared = expected.keys() & found.keys()
    misshapen = [(key, found[key], expected[key]) for key in shared if list(found[key]) != expected[key]]
    check_tensors(str(folder), expected.keys() - found.keys(), found.keys() - expected.keys(), misshapen)
    return [folder / name for name in names]
