"""Checkpoint folders: none is overwritten, none is left half-written."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import get_logger, tqdm

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.eval.instructions import paper_instructions
from nvembed.modeling_nvembed import (
    NVEmbedModel,
    check_tensors,
    format_instruction,
    load_tokenizer,
    save_sentence_transformers_files,
    save_tokenizer,
)


logger = get_logger(__name__)

# What `save_pretrained` writes; a folder that holds any of it is somebody's checkpoint.
PATTERNS = ("config*.json", "modules.json", "*.safetensors", "*.bin", "tokenizer*", "*_nvembed.py")
CARD = "README.md"


def check_output_dir(output_dir: str) -> Path:
    """Refuses a folder that holds a checkpoint already; call it before any long work.

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


def find_resume(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """The training checkpoint to go on from: the one named, or, for true, the last in `output_dir`; None for none.

    Raises:
        FileNotFoundError: there is none.
    """
    if resume_from_checkpoint is None or str(resume_from_checkpoint).lower() == "false":
        return None
    if str(resume_from_checkpoint).lower() == "true":  # as text from the command line, as a bool from a recipe
        found = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if found is None:
            raise FileNotFoundError(
                f"{output_dir} holds no checkpoint to resume from; leave --resume_from_checkpoint out to start anew"
            )
        return found
    if not Path(resume_from_checkpoint, TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(
            f"--resume_from_checkpoint {resume_from_checkpoint} is no training checkpoint: no {TRAINER_STATE_NAME}"
        )
    return str(resume_from_checkpoint)


def check_resume(checkpoint: str, model: NVEmbedModel | PeftModel) -> None:
    """Compares the names and shapes of a training checkpoint's weights with the model's; reads headers alone.

    Weights in shards, in a checkpoint of FSDP or a model of ZeRO-3, are not looked into.

    Raises:
        ValueError: the checkpoint is of another base, of another adapter, or of an adapter where all weights are
            trained, or the other way round.
    """
    adapter, whole = Path(checkpoint, SAFETENSORS_WEIGHTS_NAME), sorted(Path(checkpoint).glob("model*.safetensors"))
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    adapted = isinstance(model, PeftModel)
    if adapter.is_file() != adapted and (adapter.is_file() or whole):
        kinds = ("an adapter", "all weights")
        there, here = kinds if adapter.is_file() else kinds[::-1]
        raise ValueError(
            f"{checkpoint} holds {there} and this run trains {here}: set use_peft: {str(not adapted).lower()}"
        )
    weights = get_peft_model_state_dict(model) if adapted else model.state_dict()
    expected = {name: list(tensor.shape) for name, tensor in weights.items()}
    found = {}
    for path in [adapter] if adapter.is_file() else whole:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in list(file.keys())}
    if not found:
        return
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"{checkpoint} does not belong to this model and adapter: {name} is {found.get(name, 'absent')} there and "
            f"{expected.get(name, 'absent')} here; give the model_name_or_path and LoRA settings it was trained with"
        )


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
        ValueError: a weight is not finite.
    """
    check_output_dir(output_dir)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, nothing is saved; training needs a lower learning_rate")
    with staged(output_dir) as partial:
        model.save_pretrained(partial)
        add_card(partial, write_card)


def add_card(folder: Path, write_card: Callable[[Path], None] | None) -> None:
    """Calls `write_card`, if there is one; its error is logged: weights without a card are worth keeping."""
    try:
        if write_card is not None:
            write_card(folder)
    except Exception:
        logger.exception("No model card could be written; the weights are saved without one")


def fold_released(source: str, output_dir: str) -> None:
    """Writes a released checkpoint with its latent attention folded; loads it whole, in the dtype of its files.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
        ValueError: as `NVEmbedModel.from_pretrained`.
    """
    check_output_dir(output_dir)
    model = NVEmbedModel.from_pretrained(source, dtype="auto", fold_latent_attention=True)
    model.config.prompts = model.config.prompts or paper_prompts()
    write_checkpoint(model, output_dir)


def convert_released(source: str, output_dir: str) -> None:
    """Writes a released checkpoint with our code: the same weights, never read into memory.

    The files of weights are hard links where the file system allows it, copies elsewhere. Config, tokenizer, license
    and model card stay what they say; code, prompts of the paper's tasks and sentence-transformers files are ours.

    Args:
        source: a local folder in the released layout, or a Hub name such as `nvidia/NV-Embed-v2`.
        output_dir: the folder to write; must not hold a checkpoint.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
        ValueError: `source` is no NV-Embed checkpoint, or a tensor is missing, unknown, of another shape or cut off.
    """
    check_output_dir(output_dir)
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", *DOCUMENTS]))
        except Exception as error:
            raise ValueError(
                f"{source} is neither a local folder nor a Hub model that can be reached: {error}"
            ) from error
    kind = NVEmbedConfig.get_config_dict(folder)[0].get("model_type")
    if kind != NVEmbedConfig.model_type:
        raise ValueError(f"{source} is a {kind!r} model, not a released NV-Embed; --base makes one from a decoder")
    config = NVEmbedConfig.from_pretrained(folder)
    config.prompts = config.prompts or paper_prompts()
    with torch.device("meta"):
        model = NVEmbedModel(config)
    shards = check_weights(folder, {name: list(tensor.shape) for name, tensor in model.state_dict().items()})
    with staged(output_dir) as partial:
        for shard in tqdm(shards, desc="Linking", unit="file"):
            link_or_copy(shard, partial / shard.name)
        for file in (path for pattern in (INDEX, *DOCUMENTS) for path in folder.glob(pattern)):
            shutil.copyfile(file, partial / file.name)
        save_tokenizer(load_tokenizer(str(folder), config.add_pad_token), str(partial))
        save_sentence_transformers_files(config, str(partial))
        custom_object_save(model, str(partial), config=config)  # the two code files, and `auto_map`
        config.architectures = [type(model).__name__]
        config.save_pretrained(partial)


INDEX = "model.safetensors.index.json"
DOCUMENTS = ("LICENSE*", "README.md")  # the released weights have a license of their own


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


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)  # the Hub's cache holds links to its files
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def paper_prompts() -> dict[str, str]:
    """The paper's instructions by task, for `config.prompts`; "<task>-document" is empty where documents carry none.

    The second name is for mteb, which gives a prompt under the bare name of the task to queries and documents alike.
    """
    prompts = {}
    for task, instruction in paper_instructions().items():
        prompts[task] = format_instruction(instruction.query)
        if not instruction.document:
            prompts[f"{task}-document"] = ""
    prompts["Summarization"] = prompts["SUMM"]  # mteb's name of the released SUMM
    return prompts
