"""Times `encode` on random weights, dense against 2:4 sparse, INT8 and FP8 decoders, in one run.

    python eval/speed/compressed.py --shape mistral-7b --device cuda --dtype bfloat16
    python eval/speed/compressed.py --layers 4 --ways dense int8-weights              # on this CPU

The decoder's linear layers change, embeddings, norms and the (folded) latent attention stay in `--dtype`:

- `dense`: as they are;
- `int8-weights`, `fp8-weights`: stored in 8 bits, multiplied in `--dtype`: smaller, and no faster;
- `int8`, `fp8`: activations too, per token, so that the product itself runs in 8 bits;
- `2:4`: two of four weights in a row dropped by magnitude, multiplied by torch's semi-structured kernel;
- `2:4-fp8`: both, by torchao's CUTLASS kernel (Hopper).

`--compiled` names ways to time once more with their layers under `torch.compile`, which fuses the rounding of
activations into its neighbours. A way that this machine cannot run is reported with its error, and the rest goes on.
Random weights tell how fast and how large a way is, not what it costs in accuracy: the cosine to `dense` only shows
that a way computes the same thing. Prints a Markdown table. Needs torchao (tried: 0.18.0) but for `dense` and `2:4`.
"""

import argparse
import gc
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import date
from functools import partial

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from transformers.utils.logging import tqdm

from nvembed import NVEmbedModel
from nvembed.eval.peak_memory import peak_memory, reset_peak_memory
from nvembed.eval.speed.encode import (
    SHAPES,
    random_model,
    real_texts,
    timed,
    train_tokenizer,
)
from nvembed.eval.stored import stored_bytes
from nvembed.texts_nvembed import PackedLayout, tokenize


def keep_two_of_four(weight: Tensor) -> Tensor:
    """`weight`, `[rows, columns]`, with the two smallest of every four neighbours in a row set to zero."""
    groups = weight.unflatten(-1, (-1, 4))
    smallest = groups.abs().topk(2, dim=-1, largest=False).indices
    return groups.scatter(-1, smallest, 0.0).flatten(-2)


def make_sparse(decoder: nn.Module) -> None:
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(to_sparse_semi_structured(keep_two_of_four(module.weight.data)), False)


def make_quantized(name: str, decoder: nn.Module) -> None:
    """torchao's `quantize_` with the configuration of a way."""
    from torchao import quantization as ao

    configs: dict[str, Callable] = {
        "int8-weights": ao.Int8WeightOnlyConfig,
        "int8": ao.Int8DynamicActivationInt8WeightConfig,
        "fp8-weights": ao.Float8WeightOnlyConfig,
        "fp8": partial(ao.Float8DynamicActivationFloat8WeightConfig, granularity=ao.PerRow()),
        "2:4-fp8": partial(
            ao.Float8DynamicActivationFloat8WeightConfig, granularity=ao.PerRow(), packing_format="sparse_cutlass"
        ),
    }
    if name == "2:4-fp8":
        for module in decoder.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = keep_two_of_four(module.weight.data)
    ao.quantize_(decoder, configs[name](set_inductor_config=False))  # it makes compiling many times as slow


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "dense": lambda decoder: None,
    "int8-weights": partial(make_quantized, "int8-weights"),
    "int8": partial(make_quantized, "int8"),
    "fp8-weights": partial(make_quantized, "fp8-weights"),
    "fp8": partial(make_quantized, "fp8"),
    "2:4": make_sparse,
    "2:4-fp8": partial(make_quantized, "2:4-fp8"),
}


def compile_layers(decoder: nn.Module) -> None:
    """Compiles the layers for any number of tokens; attention, whose kernel knows texts by length, stays out."""
    if not hasattr(PackedLayout.attend, "_torchdynamo_disable"):
        PackedLayout.attend = torch.compiler.disable(PackedLayout.attend)
    for layer in decoder.layers:
        layer.compile(dynamic=True)


def make_ways(decoder: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Module | str]]:
    """Yields each way's name ("dense", "dense compiled", ...) with its decoder, or with the error that it met."""
    for name in names:
        try:
            variant = deepcopy(decoder) if name != "dense" else decoder
            WAYS[name.removesuffix(" compiled")](variant)
            if name.endswith(" compiled"):
                compile_layers(variant)
        except Exception as error:  # a benchmark of many ways: one that cannot run here must not take the others along
            print(f"{name}: {describe(error)}", file=sys.stderr)
            yield name, describe(error)
        else:
            yield name, variant


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".replace("|", "/")


def measure(model: NVEmbedModel, texts: list[str], args: argparse.Namespace) -> Iterator[str]:
    """Rows of the table; the ways take turns, and the first turn of each, not counted, warms it up."""
    rows = tokenize(model.tokenizer, model.config, texts, [""] * len(texts), args.max_length)
    lengths = [len(row.input_ids) for row in rows]
    quartiles = "/".join(f"{q:.0f}" for q in statistics.quantiles(lengths, n=4))
    print(f"{len(texts)} texts of {quartiles} tokens (quartiles)")
    variants, failed = {}, {}
    names = [*args.ways, *(f"{name} compiled" for name in args.compiled)]
    for name, variant in make_ways(model.embedding_model, names):
        (failed if isinstance(variant, str) else variants)[name] = variant
    gc.collect()
    rest = stored_bytes(model.latent_attention_model)
    sizes = {name: stored_bytes(variant) + rest for name, variant in variants.items()}
    all_sizes = sum(stored_bytes(variant) for variant in variants.values()) + rest
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    activations, embeddings = dict.fromkeys(variants, 0.0), {}
    encode = partial(model.encode, max_length=args.max_length, batch_tokens=args.batch_tokens)
    for i in tqdm(range(args.rounds + 1), desc="Rounds"):
        for name in [name for name in variants if name not in failed]:
            model.embedding_model = variants[name]
            reset_peak_memory(model.device)
            try:
                took = timed(lambda name=name: embeddings.update({name: encode(texts).float().cpu()}), model.device)
            except Exception as error:
                failed[name] = describe(error)
                print(f"{name}: {failed[name]}", file=sys.stderr)
                continue
            if i == 0:
                print(f"{name}: warm-up {took:.1f} s", file=sys.stderr)
            else:
                seconds[name].append(took)
                if model.device.type == "cuda":
                    activations[name] = max(activations[name], peak_memory(model.device) - all_sizes / 1e9)
    model.embedding_model = variants["dense"]
    for name in names:
        if name in failed:
            yield f"| {name} | {failed[name]} | | | | | |"
            continue
        ratios = [d / s for d, s in zip(seconds["dense"], seconds[name])]
        median = statistics.median(seconds[name])
        cosine = torch.cosine_similarity(embeddings[name], embeddings["dense"]).mean()
        working = f"{activations[name]:.2f}" if model.device.type == "cuda" else "-"
        yield (
            f"| {name} | {sizes[name] / 1e9:.2f} | {working} | {len(texts) / median:,.1f} | "
            f"{sum(lengths) / median:,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | "
            f"{cosine:.3f} |"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, help="default: 10 of smollm2's 30, all 32 of mistral-7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--words", type=int, default=120, help="words of a text, at least")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_tokens", type=int, help="of encode; default as encode's")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="`dense` is always one of them")
    parser.add_argument("--compiled", nargs="*", choices=WAYS, default=[])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    args.ways = ["dense", *(way for way in args.ways if way != "dense")]

    layers = args.layers or {"smollm2": 10, "mistral-7b": 32}[args.shape]
    _, passages = real_texts(args.words)
    model = random_model(args.shape, layers, args.device, getattr(torch, args.dtype))
    model.tokenizer = train_tokenizer(passages)
    model.fold_latent_attention()
    texts = [passages[i % len(passages)] for i in range(args.texts)]

    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{args.shape}, {layers} layers, {args.dtype}; {device}, {platform.processor() or platform.machine()}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {date.today()}, {args.rounds} rounds")
    rows = list(measure(model, texts, args))
    print("| way | weights GB | activations GB | texts/s | tokens/s | x dense | cosine |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
