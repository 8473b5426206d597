"""Prunes a checkpoint's decoder: single weights, or whole layers, neurons and heads (paper, Appendix A).

    python train/compress/prune.py --config compress
    python train/compress/prune.py --model_name_or_path runs/stage2 --datasets data.jsonl --method sparsegpt \\
      --pattern 2:4 --output_dir runs/pruned

A pruned checkpoint loads as any other; what follows (`train/distill.py`, `stage2.py`, `quantize.py`) keeps its zeros.
Zeros make it neither smaller nor faster by themselves: 2:4 is fast in torch's semi-structured kernels on a GPU, and
unstructured and 4:8 sparsity nowhere. `num_layers`, `intermediate_size` and `num_key_value_heads` make it both.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from nvembed.eval.commands import errors_in_one_line
from nvembed.modeling_nvembed import MeanPooling, NVEmbedModel
from nvembed.train.checkpoints import check_output_dir
from nvembed.train.compress.calibration import CompressionArguments, LayerInputs, calibration_chunks, walk_layers
from nvembed.train.compress.checkpoint import load_uncompressed, write_compressed
from nvembed.train.compress.report import report_table
from nvembed.train.compress.solvers import METHODS, relative_error
from nvembed.train.compress.sparsity import Pattern, decoder_matrices
from nvembed.train.compress.structure import drop_layers, narrow
from nvembed.train.recipe import RecipeParser


REPORT = "pruning.json"  # in the checkpoint's folder


@dataclass
class PruneArguments(CompressionArguments):
    stage: ClassVar[str] = "prune"

    method: Literal["sparsegpt", "wanda", "magnitude"] | None = field(
        default=None, metadata={"help": "How single weights are chosen (paper: SparseGPT is best). None: they stay."}
    )
    pattern: str | None = field(
        default=None,
        metadata={"help": "unstructured, or N:M: N of M neighbours in a row are kept, such as 4:8. None: 2:4."},
    )
    sparsity: float | None = field(default=None, metadata={"help": "Share of zeros if unstructured; None: 0.5."})
    num_layers: int | None = field(default=None, metadata={"help": "Keep this many layers."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Keep this many neurons of every MLP."})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Keep this many key heads of every layer, with their query heads."}
    )
    drop_latent_attention: bool = field(
        default=False,
        metadata={"help": "Pool by the mean alone; distil afterwards (paper: behind the teacher's latent attention)."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("sparsity", "pattern"):
            if self.method is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is {getattr(self, name)} and no method is given: set method: sparsegpt")
        # Before the model is loaded: a misspelt pattern must not cost that.
        self.parsed_pattern = Pattern.parse("2:4" if self.pattern is None else self.pattern, self.sparsity)
        if not self.looks_at_data and not self.drop_latent_attention:
            raise ValueError(
                "nothing is to be pruned: give method (sparsegpt, wanda, magnitude), num_layers, intermediate_size, "
                "num_key_value_heads or drop_latent_attention"
            )
        if self.looks_at_data and not self.datasets:
            raise ValueError("datasets is empty; pruning looks at the data that the model was trained on: name it")

    @property
    def looks_at_data(self) -> bool:
        """Whether anything but the latent attention is to go."""
        smaller = (self.method, self.num_layers, self.intermediate_size, self.num_key_value_heads)
        return any(value is not None for value in smaller)


def prune(args: PruneArguments, model: NVEmbedModel) -> list[dict]:
    """Prunes `model` in place; returns the report, one entry a matrix.

    Raises:
        ValueError: the data or the sizes do not allow what is asked for; see `PruneArguments`, `calibration_chunks`,
            `drop_layers` and `narrow`.
    """
    is_narrowed = args.intermediate_size is not None or args.num_key_value_heads is not None
    if args.method is not None:
        check_widths(args, model)
    elif is_narrowed and model.config.is_sparse:
        raise ValueError(
            f"the checkpoint is {model.config.pruning['pattern']} already, and its groups would not outlive fewer "
            "columns: narrow the dense one first, or give method, too"
        )
    chunks = calibration_chunks(args, model) if args.looks_at_data else []
    pruning = dict(model.config.pruning or {})
    if args.num_layers is not None:
        kept = drop_layers(model, chunks, args.device, args.num_layers)
        pruning["layers"] = [pruning["layers"][i] for i in kept] if "layers" in pruning else kept
    if is_narrowed:
        narrow(model, chunks, args.device, args.intermediate_size, args.num_key_value_heads)
        sizes = {"intermediate_size": args.intermediate_size, "num_key_value_heads": args.num_key_value_heads}
        pruning |= {name: size for name, size in sizes.items() if size is not None}
    report = []
    if args.method is not None:
        report = prune_weights(model, chunks, args.device, args.method, args.parsed_pattern)
        pruning |= {"method": args.method, "pattern": str(args.parsed_pattern)}
        pruning["sparsity"] = args.parsed_pattern.sparsity
    if args.drop_latent_attention:
        drop_latent_attention(model)
    model.config.pruning = pruning or None
    return report


def check_widths(args: PruneArguments, model: NVEmbedModel) -> None:
    """Raises a `ValueError` if a matrix, narrowed as asked for, would have rows that its pattern does not fit."""
    text = model.config.text_config
    heads = args.num_key_value_heads or text.num_key_value_heads
    narrowed = {
        "mlp.down_proj": args.intermediate_size or text.intermediate_size,
        "self_attn.o_proj": heads * (text.num_attention_heads // text.num_key_value_heads) * text.head_dim,
    }
    for name, module in decoder_matrices(model.embedding_model).items():
        kind = name.split(".", 2)[2]
        args.parsed_pattern.check_fits(f"embedding_model.{name}", narrowed.get(kind, module.in_features))


def prune_weights(model: NVEmbedModel, chunks: list[dict], device: str, method: str, pattern: Pattern) -> list[dict]:
    """Prunes the decoder's matrices layer by layer; returns for each its share of zeros and its outputs' error."""
    report = []

    def change(index: int, layer: nn.Module, inputs: LayerInputs) -> None:
        for name, module in decoder_matrices(layer).items():
            moments = inputs.moments[name]
            pruned = METHODS[method](module.weight.data, moments, pattern)
            report.append(
                {
                    "matrix": f"layers.{index}.{name}",
                    "shape": list(pruned.shape),
                    "sparsity": float((pruned == 0).float().mean()),
                    "relative_error": relative_error(module.weight.data, pruned, moments),
                    "tokens": inputs.tokens,
                }
            )
            module.weight.data = pruned

    walk_layers(model, chunks, device, change)
    return report


def drop_latent_attention(model: NVEmbedModel) -> None:
    """Pools by the mean from here on.

    Raises:
        ValueError: it has no latent attention, or the embeddings' projection or mean would be lost.
    """
    if model.config.pooling_type != "latent_attention":
        raise ValueError(f"drop_latent_attention: pooling_type is {model.config.pooling_type!r}; leave it out")
    if model.config.latent_attention_config.projection_dim is not None:
        raise ValueError("drop_latent_attention: the checkpoint projects its embeddings behind the latent attention")
    if model.config.latent_attention_config.subtract_mean:
        raise ValueError(
            "drop_latent_attention: the checkpoint subtracts the mean of what comes behind the latent attention: prune "
            "the one that train/center.py made it from"
        )
    model.config.pooling_type = "mean"
    model.latent_attention_model = MeanPooling(model.config.latent_attention_config)


def main(args: PruneArguments) -> None:
    check_output_dir(args.output_dir)
    model = load_uncompressed(args.model_name_or_path, args.model_revision, "prune", args.dtype)
    report = prune(args, model)
    text = describe(args, model, report)

    write_compressed(model, args, "prune", REPORT, report, text)
    print(text)


def describe(args: PruneArguments, model: NVEmbedModel, report: list[dict]) -> str:
    """The card's paragraph."""
    pruning, text = model.config.pruning or {}, model.config.text_config
    done = []
    if "layers" in pruning and args.num_layers is not None:
        done.append(f"kept layers {', '.join(map(str, pruning['layers']))}")
    if args.intermediate_size is not None:
        done.append(f"kept {text.intermediate_size} neurons of every MLP")
    if args.num_key_value_heads is not None:
        done.append(f"kept {text.num_key_value_heads} key heads, {text.num_attention_heads} query heads of every layer")
    if args.method is not None:
        done.append(f"set {pruning['sparsity']:.0%} of the weights to zero, {pruning['pattern']}, by {args.method}")
    if args.drop_latent_attention:
        done.append("dropped the latent attention")
    if args.looks_at_data:
        done.append(f"{args.calibration_samples} triplets looked at")
    text = f"`train/compress/prune.py` of nvembed {'; '.join(done)}."
    if report:
        text += (
            f"\n\n{report_table(report)}\n\nErrors are relative, of each matrix's outputs on those triplets before "
            "later layers and training make up for them."
        )
    return text


if __name__ == "__main__":
    with errors_in_one_line():
        main(*RecipeParser(PruneArguments).parse_args_and_config())
