"""What the decoder's matrices get to see: real triplets, packed as in training, walked through one layer at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from nvembed.modeling_nvembed import NVEmbedModel, default_batch_tokens
from nvembed.texts_nvembed import PackedLayout
from nvembed.train.arguments import TripletArguments
from nvembed.train.collator import TripletCollator
from nvembed.train.data.blend import Blend
from nvembed.train.data.prepared import read_tables, write_tables
from nvembed.train.data.source import check_exists, check_sources


# Matrices of a layer by the one that is watched: those beside it get the same inputs.
SAME_INPUTS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


@dataclass
class CompressionArguments(TripletArguments):
    """The checkpoint that a step changes, and the triplets that it looks at."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The trained checkpoint."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the new checkpoint."})
    num_negatives: int = field(default=1, metadata={"help": "Hard negatives of a triplet that are looked at."})
    calibration_samples: int = field(
        default=128, metadata={"help": "Triplets to look at; of sets without a weight in equal shares."}
    )
    seed: int = field(default=42, metadata={"help": "Of their choice."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Of the weights and of what is computed; auto: as in the checkpoint."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Where one layer at a time computes; None: a GPU if there is one."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("model_name_or_path", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing; give --{name}, or name it in the recipe")
        if self.calibration_samples < 1:
            raise ValueError(f"calibration_samples is {self.calibration_samples}; it must be 1 or more")
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"


def calibration_chunks(args: CompressionArguments, model: NVEmbedModel) -> list[dict]:
    """The texts of `calibration_samples` triplets, each once, packed without padding, with their instructions.

    Raises:
        ValueError: there are no data sets, or fewer triplets than asked for.
    """
    check_sources(args.datasets)
    for source in args.datasets:
        check_exists(source)
    # No more of a set than could be needed: of the paper's, mining all would take hours.
    limits = (min(source.samples or args.calibration_samples, args.calibration_samples) for source in args.datasets)
    sources = [replace(source, samples=limit) for source, limit in zip(args.datasets, limits)]
    with TemporaryDirectory() as name:
        write_tables(Path(name, "triplets"), sources, args.num_negatives, args.seed, args.instruction)
        tables = read_tables(Path(name, "triplets"), sources)
        found = sum(map(len, tables))
        if found < args.calibration_samples:
            raise ValueError(
                f"the data has {found} triplets and calibration_samples is {args.calibration_samples}; lower it, or "
                "give more data"
            )
        weights = args.weights or [1.0] * len(tables)  # their lengths say nothing once they are cut
        rows = list(Blend(tables, args.calibration_samples, weights, args.seed))
    tokens = default_batch_tokens(torch.device(args.device))
    collate = TripletCollator(model.tokenizer, model.config, args.max_length, args.num_negatives, tokens)
    return collate(rows)["chunks"]


@dataclass
class LayerInputs:
    """What one layer got to see.

    Args:
        moments: by matrix, the sum over all tokens of x x^T for its inputs x, fp32 `[columns, columns]`, on the device;
            matrices with the same inputs share one tensor.
        influence: 1 - the mean cosine between the states before and after the layer (Men et al., arXiv 2403.03853).
        tokens: how many.
    """

    moments: Mapping[str, Tensor]
    influence: float
    tokens: int


@torch.no_grad()
def walk_layers(
    model: NVEmbedModel, chunks: list[dict], device: str, change: Callable[[int, nn.Module, LayerInputs], None]
) -> None:
    """Calls `change(index, layer, inputs)` for every layer, first to last, each seeing what the changed ones give.

    One layer and the states of one chunk are on the device at a time, beside one layer's moments; the states of all
    chunks are in main memory: tokens x hidden size x bytes of the model's dtype.
    """
    decoder = model.embedding_model
    layouts = [PackedLayout(chunk["lengths"]) for chunk in chunks]
    states = [decoder.embed_tokens(chunk["input_ids"].to(model.device)).cpu() for chunk in chunks]
    is_causal = decoder.mask_type == "c"

    def run(layer: nn.Module) -> Iterator[tuple[int, Tensor, Tensor]]:
        for i, (x, layout) in enumerate(zip(states, layouts)):
            x = x.to(device)
            yield i, x, layer(x, *decoder.rotations(x, layout), layout, is_causal)

    for index, layer in enumerate(tqdm(decoder.layers, desc="Layers")):
        home = next(layer.parameters()).device
        layer.to(device)
        sums, handles = {}, []
        for name in SAME_INPUTS:
            module = layer.get_submodule(name)
            sums[name] = torch.zeros(module.in_features, module.in_features, device=device)
            handles.append(module.register_forward_pre_hook(_add_moments(sums[name])))
        cosines = torch.cat([torch.cosine_similarity(x.float(), y.float(), dim=-1) for _, x, y in run(layer)])
        for handle in handles:
            handle.remove()
        moments = {name: sums[watched] for watched, names in SAME_INPUTS.items() for name in names}
        change(index, layer, LayerInputs(moments, 1 - cosines.mean().item(), len(cosines)))
        for i, _, after in run(layer):
            states[i] = after.cpu()
        layer.to(home)


def _add_moments(sums: Tensor) -> Callable:
    def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2).float()
        sums.addmm_(x.T, x)

    return add
