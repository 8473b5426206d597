"""Checkpoint folders: none is overwritten, none is left half-written."""

import os
import shutil
import tempfile
from pathlib import Path

from nvembed.modeling_nvembed import NVEmbedModel


# What `save_pretrained` writes; a folder that holds any of it is somebody's checkpoint.
PATTERNS = ("config.json", "*.safetensors", "*.bin", "tokenizer*", "modeling_nvembed.py", "configuration_nvembed.py")


def check_output_dir(output_dir: str) -> Path:
    """Refuses a folder that holds a checkpoint already; call it before any long work.

    Raises:
        FileExistsError: files of a checkpoint are there.
        NotADirectoryError: the path is a file.
    """
    folder = Path(output_dir).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder as --output_dir")
    found = sorted(path.name for pattern in PATTERNS for path in folder.glob(pattern))
    if found:
        raise FileExistsError(
            f"{folder} already holds a checkpoint ({found[0]}); name another --output_dir or move it away"
        )
    return folder


def write_checkpoint(model: NVEmbedModel, output_dir: str) -> None:
    """Saves the model beside its place and moves it there: a folder with a `config.json` is whole.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
        ValueError: a weight is not finite.
    """
    folder = check_output_dir(output_dir)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, nothing is saved; training needs a lower learning_rate")
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        model.save_pretrained(partial)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):  # config.json last
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
