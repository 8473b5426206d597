"""Loads checkpoints that are to be compressed, and writes what they have become."""

from pathlib import Path

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.eval.files import write_json
from nvembed.eval.models import find_config
from nvembed.modeling_nvembed import NVEmbedModel, find_base_of_adapter
from nvembed.train.card import continue_card
from nvembed.train.certificate import copy_certificate
from nvembed.train.checkpoints import quantized_by, write_checkpoint
from nvembed.train.compress.calibration import CompressionArguments


def load_uncompressed(name: str, revision: str | None, purpose: str, dtype: str = "auto") -> NVEmbedModel:
    """A checkpoint in main memory, in the dtype it is stored in or another.

    Raises:
        ValueError: there is no such checkpoint, its weights are quantized, it is an adapter, or, unless `purpose` is
            "quantize", its latents are folded.
    """
    if find_base_of_adapter(name, revision=revision) is not None:
        raise ValueError(f"{name} is an adapter; {purpose} the merged checkpoint (the folder around it)")
    saved, _ = find_config(name, revision)
    if saved.get("model_type") != NVEmbedConfig.model_type:
        raise ValueError(f"{name} is no NV-Embed checkpoint but {saved.get('model_type')!r}; name one")
    config = NVEmbedConfig(**saved)
    if (method := quantized_by(config)) is not None:
        raise ValueError(f"{name} is quantized already ({method}); {purpose} the checkpoint that it was made from")
    if config.latent_attention_is_folded and purpose != "quantize":
        raise ValueError(
            f"{name} has a folded latent attention, which cannot be trained again after pruning: {purpose} the "
            "unfolded checkpoint that it was made from, and fold the result"
        )
    return NVEmbedModel.from_pretrained(name, revision=revision, dtype=dtype)


def write_compressed(
    model: NVEmbedModel, args: CompressionArguments, step: str, report_file: str, report: list[dict], text: str
) -> None:
    """Writes the checkpoint with its base's certificate and card, a section of `text` added, and the report if any.

    Args:
        step: heading of the section.
        report_file: name of the report in the folder.

    Raises:
        FileExistsError: the folder already holds a checkpoint.
    """

    def add_files(folder: Path) -> None:
        if report:
            write_json(folder / report_file, report)
        copy_certificate(args.model_name_or_path, args.model_revision, folder)
        continue_card(args.model_name_or_path, args.model_revision, folder, args.output_dir, step, text)

    write_checkpoint(model, args.output_dir, add_files)
