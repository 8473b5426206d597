"""Converts released NV-Embed checkpoints to ours, without reading the weights, or folds them."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.logging import tqdm

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.eval.tasks.instructions import task_prompts
from nvembed.modeling_nvembed import NVEmbedModel, save_sentence_transformers_files
from nvembed.texts_nvembed import load_tokenizer, save_tokenizer
from nvembed.train.checkpoints import INDEX, check_output_dir, check_weights, staged, tensors_of, write_checkpoint


# The released weights have a license of their own; a checkpoint of ours, the record of what it was trained on.
DOCUMENTS = ("LICENSE*", "README.md", "training_data.json")


def fold_released(source: str, output_dir: str, tokenizer_adds_eos: bool = False) -> None:
    """Writes a released checkpoint with its latent attention folded; loads all of it, in the dtype of its files.

    Args:
        tokenizer_adds_eos: as in `convert_released`.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
        ValueError: as `fetch` and `NVEmbedModel.from_pretrained`.
    """
    check_output_dir(output_dir)
    folder = fetch(source)
    model = NVEmbedModel.from_pretrained(folder, dtype="auto", fold_latent_attention=True)
    model.config.prompts = model.config.prompts or task_prompts()
    if tokenizer_adds_eos and model.config.add_eos:
        model.tokenizer, model.config.add_eos = append_eos(model.tokenizer), False
    write_checkpoint(model, output_dir, partial(copy_documents, folder))


def append_eos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, which now writes `<s>` text `</s>` by itself, also around texts that it cuts."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = between(bos or eos, eos, tokenizer.convert_tokens_to_ids)
    return tokenizer


def between(bos: str, eos: str, id_of: Callable[[str], int]) -> TemplateProcessing:
    """A tokenizer's last step: each text between its two ends. Every text must have both: the instruction's length
    counts the first, and engines that cut a text keep the last."""
    return TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {bos} $B {eos}",
        special_tokens=[(token, id_of(token)) for token in dict.fromkeys((bos, eos))],
    )


def convert_released(source: str, output_dir: str, tokenizer_adds_eos: bool = False) -> None:
    """Writes a released checkpoint with our code: the same weights, never read into memory.

    Weight files are hard links if the file system allows it, else copies. Config, tokenizer, license and model card
    keep their contents; the code, the prompts of the paper's tasks and the sentence-transformers files are ours.

    Args:
        source: a local folder in the released layout, or a Hub name such as `nvidia/NV-Embed-v2`.
        output_dir: the folder to write; must not hold a checkpoint.
        tokenizer_adds_eos: write a tokenizer that appends `</s>` by itself, for engines that know nothing of `add_eos`.
            Tokens are the same but in cut texts, which keep their `</s>`; the released code loses it there.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
        ValueError: `source` is not an NV-Embed checkpoint, or a tensor is missing, unknown, of the wrong shape or cut
            off.
    """
    check_output_dir(output_dir)
    folder = fetch(source)
    kind = NVEmbedConfig.get_config_dict(folder)[0].get("model_type")
    if kind != NVEmbedConfig.model_type:
        raise ValueError(f"{source} is a {kind!r} model, not a released NV-Embed; --base makes one from a decoder")
    config = NVEmbedConfig.from_pretrained(folder)
    config.prompts = config.prompts or task_prompts()
    shards = check_weights(folder, tensors_of(config))
    with staged(output_dir) as target:
        for shard in tqdm(shards, desc="Linking", unit="file"):
            link_or_copy(shard, target / shard.name)
        copy_documents(folder, target, INDEX)
        tokenizer = load_tokenizer(str(folder), config.add_pad_token, config.text_config.vocab_size)
        if tokenizer_adds_eos and config.add_eos:
            tokenizer, config.add_eos = append_eos(tokenizer), False
        save_tokenizer(tokenizer, str(target))
        save_sentence_transformers_files(config, str(target))
        with torch.device("meta"):
            custom_object_save(NVEmbedModel(config), str(target), config=config)  # the code files, and `auto_map`
        config.architectures = [NVEmbedModel.__name__]
        config.save_pretrained(target)


def fetch(source: str) -> Path:
    """The folder of a released checkpoint, downloaded if it is a Hub name.

    Raises:
        ValueError: it is neither a folder nor a name that can be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", *DOCUMENTS]))
    except Exception as error:
        raise ValueError(f"{source} is neither a local folder nor a Hub model that can be reached: {error}") from error


def copy_documents(folder: Path, target: Path, *others: str) -> None:
    """Copies license, card and record of training, and files of other names."""
    for file in (path for pattern in (*DOCUMENTS, *others) for path in folder.glob(pattern)):
        shutil.copyfile(file, target / file.name)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)  # the Hub's cache holds links to its files
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
