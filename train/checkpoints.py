"""Checkpoint folders, never overwritten and never half-written."""

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
from nvembed.eval.files import LOCK, claimed, without_empty_folders
from nvembed.eval.stored import stored_parts
from nvembed.modeling_nvembed import NVEmbedModel, check_tensors


logger = get_logger(__name__)

# What `save_pretrained` and our scripts write; a folder with any of these is a checkpoint that must not be overwritten.
PATTERNS = (
    "config*.json", "modules.json", "*.safetensors", "*.bin", "tokenizer*", "*_nvembed.py", "special_tokens_map.json",
    "chat_template.jinja", "training_data.json", "pruning.json", "quantization.json", "loss_*.png",
)  # fmt: skip
CARD = "README.md"
INDEX = "model.safetensors.index.json"


def check_output_dir(output_dir: str) -> Path:
    """Raises if the folder already holds a checkpoint; call it before any long work.

    Raises:
        FileExistsError: the folder holds files of a checkpoint, or a README.md.
        NotADirectoryError: the path is a file.
        PermissionError: the folder is not writable.
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
def alone_in(output_dir: str, user: str) -> Iterator[None]:
    """Keeps other runs out of a folder that `check_output_dir` lets pass, until its checkpoint is written.

    Args:
        user: what another one is called.

    Raises:
        FileExistsError: another one has ended in it meanwhile.
        ValueError: another one runs in it.
    """
    folder = Path(output_dir).resolve()
    with without_empty_folders(folder), claimed(folder, user):
        try:
            check_output_dir(output_dir)
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # no part of a checkpoint


@contextmanager
def staged(output_dir: str) -> Iterator[Path]:
    """Yields a folder whose files are moved to `output_dir` once all are written, `config.json` last.

    Raises:
        FileExistsError: the folder already holds a checkpoint or a file that would be replaced, such as a README.md.
    """
    folder = check_output_dir(output_dir)
    with without_empty_folders(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            yield partial
            for path in (folder / file.name for file in partial.iterdir()):
                if path.exists():
                    raise FileExistsError(f"{path} would be replaced; move it away or name another folder")
            for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # config.json last
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(model: NVEmbedModel, output_dir: str, write_card: Callable[[Path], None] | None = None) -> None:
    """Saves the model.

    Args:
        write_card: writes a model card to the folder passed to it; see `add_card`.

    Raises:
        FileExistsError: the folder already holds a checkpoint.
        ValueError: a weight is not finite, or the files written do not have the tensors that the config requires.
    """
    check_output_dir(output_dir)
    for name, parameter in model.named_parameters():
        if not all(part.float().isfinite().all() for part in stored_parts(parameter.data)):
            raise ValueError(f"{name} holds NaN or infinity, nothing is saved; training needs a lower learning_rate")
    with staged(output_dir) as partial:
        model.save_pretrained(partial)
        if quantized_by(model.config) is None:
            check_weights(partial, tensors_of(NVEmbedConfig.from_pretrained(partial)))  # what does not load is not kept
        add_card(partial, write_card)


def quantized_by(config: NVEmbedConfig) -> str | None:
    """The method that a config says the weights are stored by, such as torchao; None: they are not quantized."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
    return getattr(method, "value", method)


def add_card(folder: Path, write_card: Callable[[Path], None] | None) -> None:
    """Calls `write_card`, which may write other files about the weights, if given.

    Errors are logged, not raised: weights without a card are still worth saving.
    """
    try:
        if write_card is not None:
            write_card(folder)
    except Exception:
        logger.exception("Writing the model card, or training_data.json, failed; the weights are saved without one")


def tensors_of(config: NVEmbedConfig) -> dict[str, list[int]]:
    """Names and shapes of a checkpoint's tensors."""
    with torch.device("meta"):
        model = NVEmbedModel(config)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def check_weights(folder: Path, expected: dict[str, list[int]]) -> list[Path]:
    """Returns the safetensors files of a checkpoint after checking their headers against `expected` names and shapes.

    Raises:
        ValueError: a file is missing or damaged, or a tensor is missing, unknown or of the wrong shape.
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
