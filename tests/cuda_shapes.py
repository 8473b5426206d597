"""Traces the CUDA path without a GPU, in a throwaway environment with a CUDA build of torch; `make test-cuda-shapes`.

Under `FakeTensorMode` tensors have a shape, a dtype and the device "cuda", and no numbers: forward and `encode` run as
on a GPU, kernels are asked for their output's shape alone. This shows whether every layer of the decoder reaches the
kernel for texts of different lengths, and with which arguments; it measures nothing. About 6 GB while it runs.
"""

import contextlib
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedTokenizerFast


ROOT = Path(__file__).parents[1]
PACKAGES = ("torch>=2.14", "transformers==5.17.0")
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64
TEXTS = ["one two three", "one", "two three one two", "three two"]


def build(mask_type: str, pooling_type: str, is_folded: bool, dtype: torch.dtype, pooling_width: int):
    """A small model whose parameters are fake and on "cuda"; to be called under `FakeTensorMode`."""
    from nvembed import NVEmbedConfig, NVEmbedModel

    hidden = HEADS * HEAD_DIM
    config = NVEmbedConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": LAYERS, "vocab_size": 50,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        },
        latent_attention_config={
            "num_latents_value": 16, "num_cross_heads": 2, "cross_dim_head": pooling_width, "hidden_dim": hidden,
            "latent_dim": hidden,
        },
        mask_type=mask_type, pooling_type=pooling_type, latent_attention_is_folded=is_folded,
    )  # fmt: skip
    with torch.device("meta"):
        model = NVEmbedModel(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=dtype, device="cuda")
            module.register_parameter(name, nn.Parameter(fake, requires_grad=False))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "one": 2, "two": 3, "three": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    return model.eval()


def trace(mask_type: str, pooling_type: str, is_folded: bool, dtype: torch.dtype, pooling_width: int) -> list[str]:
    """What is wrong with one configuration: nothing if `encode`'s batches and `forward` take the kernel throughout."""
    from nvembed import texts_nvembed
    from nvembed.texts_nvembed import pack, tokenize

    kernel, calls = texts_nvembed.varlen_attn, []

    def counting(q, k, v, *args, **options):
        calls.append((tuple(q.shape), tuple(k.shape), {q.dtype, k.dtype, v.dtype}, options))
        return kernel(q, k, v, *args, **options)

    with contextlib.ExitStack() as stack:
        for target, replacement in (
            ("nvembed.texts_nvembed.varlen_attn", counting),
            ("torch.cuda.is_available", lambda: True),  # else autocast switches itself off
            ("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True),
            ("torch.cuda.get_device_capability", lambda *args: (9, 0)),
            ("torch.Tensor.pin_memory", lambda tensor, *args: tensor),
        ):
            stack.enter_context(mock.patch(target, replacement))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        model = build(mask_type, pooling_type, is_folded, dtype, pooling_width)
        stack.enter_context(torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32))
        rows = tokenize(model.tokenizer, model.config, TEXTS, [""] * len(TEXTS), 512)
        embeddings = model._embed_batch(rows)  # of encode; around it, slices are assigned to, which asks for a driver
        in_encode = len(calls)
        batch = pack(rows)
        batch = {name: x.to(model.device) if torch.is_tensor(x) else x for name, x in batch.items()}
        forward = model(**batch).sentence_embeddings
    # A self-attention pooling whose heads are wider than the kernel takes goes without it.
    expected = LAYERS + (pooling_type == "self_attention" and pooling_width <= 256)
    faults = []
    if (in_encode, len(calls) - in_encode) != (expected, expected):
        faults.append(f"{in_encode} calls in encode, {len(calls) - in_encode} in forward, not {expected} in each")
    for q, k, dtypes, options in calls:
        is_causal = options.get("window_size") == (-1, 0) or options.get("is_causal") or options.get("causal")
        is_decoder = q[1:] == (HEADS, HEAD_DIM)
        if is_decoder and (k[1:] != (KV_HEADS, HEAD_DIM) or not options.get("enable_gqa")):
            faults.append(f"keys are {k}, {options}: grouped heads are repeated")
        if is_decoder and bool(is_causal) != (mask_type == "c"):
            faults.append(f"mask_type {mask_type!r} is called with {options}")
        if dtypes != {torch.bfloat16}:
            faults.append(f"dtypes are {dtypes}")
    for name, result in (("encode", embeddings), ("forward", forward)):
        if (tuple(result.shape), result.dtype, result.device.type) != ((len(TEXTS), 256), torch.float32, "cuda"):
            faults.append(f"{name} gives {tuple(result.shape)}, {result.dtype}, {result.device}")
    return faults


def trace_all() -> int:
    poolings = [
        ("latent_attention", False, 64),
        ("latent_attention", True, 64),
        ("mean", False, 64),
        ("eos", False, 64),
    ]
    poolings += [("self_attention", False, 64), ("self_attention", False, 512)]
    failed = 0
    for dtype in (torch.bfloat16, torch.float32):
        for mask_type in ("b", "c"):
            for pooling_type, is_folded, width in poolings:
                faults = trace(mask_type, pooling_type, is_folded, dtype, width)
                failed += bool(faults)
                name = f"{dtype} mask {mask_type} {pooling_type}{' folded' if is_folded else ''}, heads of {width}"
                print(f"{'FAILED' if faults else 'passed'}  {name}  {'; '.join(dict.fromkeys(faults))}")
    print(f"torch {torch.__version__}: {failed} of {4 * len(poolings)} failed")
    return failed


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="nvembed-cuda-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        next(Path(folder).glob("lib/python*/site-packages")).joinpath("nvembed").symlink_to(ROOT)
        return subprocess.run([python, __file__, "--trace"]).returncode


if __name__ == "__main__":
    sys.exit(bool(trace_all()) if sys.argv[1:] == ["--trace"] else main())
