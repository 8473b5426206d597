"""Checkpoint folders: none is overwritten, none is left half-written."""

import os
import shutil
from pathlib import Path

from nvembed.modeling_nvembed import NVEmbedModel


def check_output_dir(output_dir: str) -> None:
    """Refuses a folder that holds a checkpoint already.

    Raises:
        FileExistsError: `config.json` or weights are there.
    """
    folder = Path(output_dir)
    found = [*folder.glob("config.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if found:
        raise FileExistsError(
            f"{folder} already holds a checkpoint ({found[0].name}); name another --output_dir or move it away"
        )


def write_checkpoint(model: NVEmbedModel, output_dir: str) -> None:
    """Saves the model beside its place and moves it there: a folder with a `config.json` is whole.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
    """
    check_output_dir(output_dir)
    folder = Path(output_dir)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(partial.iterdir(), key=lambda file: file.name == "config.json")  # config.json last
        for file in files:
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
