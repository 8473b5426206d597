"""Stores a checkpoint's decoder in 8 bits (paper, Appendix A): INT8 or FP8, by rounding or, for INT8, by GPTQ.

    python train/compress/quantize.py --model_name_or_path runs/stage2 --output_dir runs/int8
    python train/compress/quantize.py --config compress --rounding gptq

The matrices of the decoder's layers and the token embeddings are stored in 8 bits by torchao, with a scale for each
row; norms and latent attention stay as they are. The checkpoint loads with `AutoModel.from_pretrained` and
`SentenceTransformer` where torchao is installed. Weights alone are quantized: products run in the model's dtype, so it
is smaller, not faster; `quantize_activations` quantizes the inputs of every product, too, which is for GPUs. To load a
checkpoint in 8 or 4 bits without writing another, see `load_in_8bit` (bitsandbytes).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    PerRow,
    quantize_,
)
from transformers import TorchAoConfig
from transformers.quantizers import AutoHfQuantizer

from nvembed.eval.commands import errors_in_one_line
from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.train.checkpoints import check_output_dir
from nvembed.train.compress.calibration import CompressionArguments, LayerInputs, calibration_chunks, walk_layers
from nvembed.train.compress.checkpoint import load_uncompressed, write_compressed
from nvembed.train.compress.report import report_table
from nvembed.train.compress.solvers import relative_error, round_gptq
from nvembed.train.compress.sparsity import check_pattern, decoder_matrices
from nvembed.train.recipe import RecipeParser


REPORT = "quantization.json"  # in the checkpoint's folder
FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


@dataclass
class QuantizeArguments(CompressionArguments):
    stage: ClassVar[str] = "quantize"

    weight_dtype: Literal["int8", "float8_e4m3fn", "float8_e5m2"] = field(
        default="int8", metadata={"help": "What the decoder's matrices are stored in, with a scale for each row."}
    )
    rounding: Literal["nearest", "gptq"] = field(
        default="nearest", metadata={"help": "gptq looks at calibration data (datasets), for int8."}
    )
    quantize_embeddings: bool = field(
        default=True, metadata={"help": "The token embeddings, too: most of a small model, little of a large one."}
    )
    quantize_activations: bool = field(
        default=False, metadata={"help": "Compute in 8 bits, too: int8, or float8_e4m3fn on GPUs that have it."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rounding == "gptq" and self.weight_dtype != "int8":
            raise ValueError(f"rounding is gptq and weight_dtype is {self.weight_dtype}; GPTQ is for int8: set nearest")
        if self.rounding == "gptq" and not self.datasets:
            raise ValueError("datasets is empty; gptq looks at the data that the model was trained on: name it")
        if self.quantize_activations and self.weight_dtype == "float8_e5m2":
            raise ValueError("quantize_activations is set and weight_dtype is float8_e5m2; products take float8_e4m3fn")

    @property
    def of_matrices(self) -> AOBaseConfig:
        if self.weight_dtype == "int8":
            kind = Int8DynamicActivationInt8WeightConfig if self.quantize_activations else Int8WeightOnlyConfig
            return kind(set_inductor_config=False)
        if self.quantize_activations:
            return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        return self.of_embeddings

    @property
    def of_embeddings(self) -> AOBaseConfig:
        if self.weight_dtype == "int8":
            return Int8WeightOnlyConfig(set_inductor_config=False)
        return Float8WeightOnlyConfig(weight_dtype=FLOAT8[self.weight_dtype], set_inductor_config=False)

    @property
    def in_config(self) -> TorchAoConfig:
        """What transformers writes into config.json, and loads by."""
        by_name = {"re:embedding_model\\.layers\\..*_proj": self.of_matrices}
        if self.quantize_embeddings:
            by_name["embedding_model.embed_tokens"] = self.of_embeddings
        return TorchAoConfig(FqnToConfig(by_name), include_input_output_embeddings=self.quantize_embeddings)


@torch.no_grad()
def quantize(args: QuantizeArguments, model: NVEmbedModel) -> list[dict]:
    """Quantizes `model` in place; returns the report of GPTQ, one entry a matrix, empty for rounding to nearest.

    Raises:
        ValueError: the config says that the decoder is pruned and it is not, or as `calibration_chunks`.
    """
    check_pattern(model.embedding_model, model.config.pruning)
    rounded, report = {}, []
    if args.rounding == "gptq":
        rounded, report = round_decoder(args, model)
    quantize_(model.embedding_model, args.of_matrices)
    if args.quantize_embeddings:
        quantize_(
            model.embedding_model, args.of_embeddings, filter_fn=lambda module, _: isinstance(module, nn.Embedding)
        )
    for name, (integers, scales) in rounded.items():
        put_integers(model.embedding_model.get_submodule(name), integers, scales)
    check_pattern(model.embedding_model, model.config.pruning)
    # As if loaded so: `save_pretrained` asks the quantizer how its tensors are written.
    model.hf_quantizer = AutoHfQuantizer.from_config(args.in_config)
    model.config.quantization_config = args.in_config
    return report


def round_decoder(args: QuantizeArguments, model: NVEmbedModel) -> tuple[dict[str, tuple[Tensor, Tensor]], list[dict]]:
    """By matrix, GPTQ's integers and the scales of its rows; the model gets their products, in its own dtype."""
    rounded, report = {}, []

    def change(index: int, layer: nn.Module, inputs: LayerInputs) -> None:
        for name, module in decoder_matrices(layer).items():
            weight, moments = module.weight.data, inputs.moments[name]
            scales = row_scales(weight)
            integers = round_gptq(weight.float(), moments, scales)
            nearest = (weight.float() / scales).round() * scales
            module.weight.data = (integers * scales).to(weight.dtype)
            rounded[f"layers.{index}.{name}"] = integers.to(torch.int8).cpu(), scales.cpu()
            report.append(
                {
                    "matrix": f"layers.{index}.{name}",
                    "shape": list(weight.shape),
                    "sparsity": float((integers == 0).float().mean()),
                    "relative_error": relative_error(weight, integers * scales, moments),
                    "relative_error_of_nearest": relative_error(weight, nearest, moments),
                    "tokens": inputs.tokens,
                }
            )

    walk_layers(model, calibration_chunks(args, model), args.device, change)
    return rounded, report


def row_scales(weight: Tensor) -> Tensor:
    """What 1 stands for in each row of int8, so that the largest weight is 127: fp32 `[rows, 1]`."""
    return weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127


def put_integers(module: nn.Linear, integers: Tensor, scales: Tensor) -> None:
    """Replaces the integers and scales of a quantized matrix."""
    old = module.weight
    scales = scales.to(old.scale.dtype).view_as(old.scale)
    options = {name: getattr(old, name) for name in ("act_quant_kwargs", "reduce_range")}
    tensor = Int8Tensor(integers.to(old.device), scales.to(old.device), old.block_size, old.dtype, **options)
    module.weight = nn.Parameter(tensor, requires_grad=False)


def describe(args: QuantizeArguments, report: list[dict]) -> str:
    """The card's paragraph."""
    by = "GPTQ" if args.rounding == "gptq" else "rounding to nearest"
    activations = ", and so are their inputs" if args.quantize_activations else ""
    embeddings = " and the token embeddings" if args.quantize_embeddings else ""
    text = (
        f"`train/compress/quantize.py` of nvembed: the decoder's matrices{embeddings} are in {args.weight_dtype}, a "
        f"scale for each row, by {by}{activations}. Loading needs torchao."
    )
    return text + (f"\n\n{report_table(report)}" if report else "")


def main(args: QuantizeArguments) -> None:
    check_output_dir(args.output_dir)
    model = load_uncompressed(args.model_name_or_path, args.model_revision, "quantize", args.dtype)
    report = quantize(args, model)
    text = describe(args, report)

    write_compressed(model, args, "quantize", REPORT, report, text)
    print(text)


if __name__ == "__main__":
    with errors_in_one_line():
        main(*RecipeParser(QuantizeArguments).parse_args_and_config())
