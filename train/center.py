"""Writes a checkpoint that subtracts the mean of its embeddings from each, so that they do not crowd into a cone.

    python train/center.py --model_name_or_path runs/stage2 --output_dir runs/centred --datasets my.jsonl

The mean is over the texts of `calibration_samples` triplets, queries with their instructions and passages as in
training, before normalizing. It is a constant of the checkpoint (`latent_attention_model.mean_embedding`); training and
folding keep it.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from nvembed.eval.commands import errors_in_one_line
from nvembed.eval.spread import effective_rank, mean_cosine
from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.texts_nvembed import PackedLayout
from nvembed.train.checkpoints import check_output_dir
from nvembed.train.compress.calibration import CompressionArguments, calibration_chunks
from nvembed.train.compress.checkpoint import load_uncompressed, write_compressed
from nvembed.train.recipe import RecipeParser


@dataclass
class CenterArguments(CompressionArguments):
    stage: ClassVar[str] = "center"

    calibration_samples: int = field(default=512, metadata={"help": "Triplets whose texts make the mean."})


@torch.no_grad()
def raw_embeddings(model: NVEmbedModel, chunks: list[dict], device: str) -> Tensor:
    """Embeddings of the texts of packed chunks before normalizing, fp32 `[texts, hidden]` in main memory."""
    model.eval().to(device)
    block, embeddings = model.latent_attention_model, []
    for chunk in chunks:
        states = model(chunk["input_ids"].to(device), lengths=chunk["lengths"]).last_hidden_state
        embeddings.append(block.reduce(states, chunk["pool_mask"], PackedLayout(chunk["lengths"])).float().cpu())
    return torch.cat(embeddings)


def center(args: CenterArguments, model: NVEmbedModel) -> str:
    """Subtracts the mean from a model's embeddings from now on; returns what it did for the card.

    Raises:
        ValueError: as `calibration_chunks`; the model is centred already.
    """
    settings = model.config.latent_attention_config
    if settings.subtract_mean:
        raise ValueError(f"{args.model_name_or_path} is centred already; center the checkpoint that it was made from")
    embeddings = raw_embeddings(model, calibration_chunks(args, model), args.device)
    mean, figures = embeddings.mean(0), []
    for vectors in (embeddings, embeddings - mean):
        unit = torch.nn.functional.normalize(vectors, dim=-1)
        figures.append(f"mean cosine {mean_cosine(unit):.3f}, effective rank {effective_rank(unit):.1f}")
    settings.subtract_mean = True
    model.latent_attention_model.mean_embedding = mean.to(model.device, model.dtype)
    return (
        f"`train/center.py` of nvembed: embeddings are without the mean of {len(embeddings)} texts. Before: "
        f"{figures[0]}. Now: {figures[1]}."
    )


def main(args: CenterArguments) -> None:
    check_output_dir(args.output_dir)
    model = load_uncompressed(args.model_name_or_path, args.model_revision, "center", args.dtype)
    text = center(args, model)
    write_compressed(model, args, "center", "", [], text)
    print(text)


if __name__ == "__main__":
    with errors_in_one_line():
        main(*RecipeParser(CenterArguments).parse_args_and_config())
