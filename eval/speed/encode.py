"""Times `encode` on random weights against the released way of encoding, in one run.

    python eval/speed/encode.py                                            # SmolLM2's shape, 10 layers, fp32, this CPU
    python eval/speed/encode.py --layers 30
    python eval/speed/encode.py --shape mistral-7b --device cuda --dtype bfloat16 --passage_words 420

Four ways to embed the same texts with the same weights: `released` (the whole list padded to its longest text, latents
copied and projected for every row, as the released code does), `unfolded`, `folded`, and `mean`, the decoder with plain
mean pooling, which is the floor. They take turns, `--rounds` times, and the medians are reported: texts and tokens per
second, useful FLOP/s (those of the texts' own tokens, padding and repeated projections left out) beside those of a
large matrix product measured in the same turns, and peak memory. Prints a Markdown table.
"""

import argparse
import platform
import pydoc_data.topics
import re
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.utils.logging import tqdm

from nvembed import NVEmbedConfig, NVEmbedModel
from nvembed.eval.peak_memory import peak_memory, reset_peak_memory
from nvembed.modeling_nvembed import FoldedLatentAttention, LatentAttention, MeanPooling
from nvembed.texts_nvembed import PaddedLayout, format_instruction, pad, tokenize


SHAPES = {
    "smollm2": {  # SmolLM2-135M
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_theta": 100_000.0,
    },
    "mistral-7b": {  # the released checkpoints
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
INSTRUCTION = format_instruction("Given a question, retrieve passages that answer the question")
WAYS = ("released", "unfolded", "folded", "mean")


# --- Model and texts


def random_model(
    shape: str, layers: int, device: str, dtype: torch.dtype, pooling_type: str = "latent_attention"
) -> NVEmbedModel:
    """Random weights made on the device; 512 latents, 8 heads as wide as the hidden size, as released."""
    fields = SHAPES[shape] | {"num_hidden_layers": layers}
    width = fields["hidden_size"]
    latents = {"hidden_dim": width, "latent_dim": width, "cross_dim_head": width}
    config = NVEmbedConfig(text_config=fields, latent_attention_config=latents, pooling_type=pooling_type)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=dtype).eval()
    for name, parameter in model.latent_attention_model.named_parameters():
        # A new block is zero; a trained one is not. Of this size, scores vary by about 1 and every part counts.
        std = 1.0 if name == "latents" else parameter.shape[-1] ** -0.5
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=std)
    return model


def real_paragraphs() -> list[str]:
    """Paragraphs of more than 5 words of Python's own reference."""
    paragraphs = [" ".join(p.split()) for topic in pydoc_data.topics.topics.values() for p in topic.split("\n\n")]
    return [p for p in paragraphs if p.count(" ") > 4]


def real_texts(passage_words: int = 120) -> tuple[list[str], list[str]]:
    """Sentences of 5 to 15 words and runs of whole paragraphs of so many words or more, from Python's own reference."""
    prose = real_paragraphs()
    sentences = [s for p in prose for s in re.split(r"(?<=[.?!]) ", p) if 5 <= len(s.split()) <= 15]
    passages, words = [], []
    for paragraph in prose:
        words += paragraph.split()
        if len(words) >= passage_words:
            passages.append(" ".join(words))
            words = []
    return list(dict.fromkeys(sentences)), passages


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 8,000 pieces, so that the texts have real lengths without a download."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*texts, INSTRUCTION], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


# --- The released way


@torch.no_grad()
def released_encode(model: NVEmbedModel, texts: list[str], instruction: str, max_length: int) -> Tensor:
    """What `encode` of the released code does, on our decoder."""
    rows = tokenize(model.tokenizer, model.config, texts, [instruction] * len(texts), max_length)
    features = {name: x.to(model.device) for name, x in pad(rows, model.tokenizer.pad_token_id).items()}
    layout = PaddedLayout(features["input_ids"].shape[1], features["attention_mask"])
    x = model.embedding_model(features["input_ids"], layout)
    block = model.latent_attention_model
    attend, feed = block.cross_attend_blocks
    latents = block.latents.repeat(len(texts), 1, 1)  # every row projects its own copy
    x = x + attend.fn(attend.norm(x), attend.norm_context(latents), PaddedLayout(x.shape[1]))
    x = x + feed.fn(feed.norm(x))
    return block.pool(x, features["pool_mask"], layout)


# --- Counting


def useful_flops(config: NVEmbedConfig, lengths: list[int], way: str) -> float:
    """Multiply-adds, two FLOPs each, of the texts' own tokens in matrix products."""
    decoder, latent = config.text_config, config.latent_attention_config
    hidden, heads = decoder.hidden_size, decoder.num_attention_heads * decoder.head_dim
    kv_heads = decoder.num_key_value_heads * decoder.head_dim
    projections = 2 * (2 * hidden * heads + 2 * hidden * kv_heads + 3 * hidden * decoder.intermediate_size)
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    flops = decoder.num_hidden_layers * (projections * tokens + 4 * heads * squares)
    inner, scores = latent.num_cross_heads * latent.cross_dim_head, latent.num_cross_heads * latent.num_latents_value
    feed_forward = 2 * (8 + 4) * hidden * hidden
    if way == "folded":
        flops += tokens * (4 * hidden * scores + feed_forward)
    elif way != "mean":
        flops += tokens * (4 * hidden * inner + 4 * latent.num_latents_value * inner + feed_forward)
    return flops


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = min(timed(lambda: a @ b, device) for _ in range(5))
    return 2 * size**3 / seconds


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes; synchronizes a GPU before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


# --- The run


def measure(model: NVEmbedModel, texts: list[str], instruction: str, args: argparse.Namespace, progress) -> list[str]:
    """Rows of the table, one for each way."""
    pooling = model.latent_attention_model
    folded = FoldedLatentAttention.fold(pooling, model.config.latent_attention_config)
    mean = MeanPooling(model.config.latent_attention_config).eval()
    options = {"max_length": args.max_length, "batch_tokens": args.batch_tokens}

    def select(way: str) -> None:
        """Keeps only the pooling in use on the device, so that peak memory is that of one way."""
        chosen = {"folded": folded, "mean": mean}.get(way, pooling)
        for block in (pooling, folded, mean):
            block.to(model.device if block is chosen else "cpu")
        model.latent_attention_model = chosen

    def encode(way: str, some: list[str]) -> Tensor:
        if way == "released":  # the whole list in one call, or as many texts as its memory allows
            lists = (some[i : i + args.released_list] for i in range(0, len(some), args.released_list))
            return torch.cat([released_encode(model, part, instruction, args.max_length) for part in lists])
        return model.encode(some, instruction, **options)

    check_agreement(select, encode, texts[:8], args)
    rows = tokenize(model.tokenizer, model.config, texts, [instruction] * len(texts), args.max_length)
    lengths = [len(row.input_ids) for row in rows]
    seconds, memory = {way: [] for way in WAYS}, dict.fromkeys(WAYS, 0.0)
    peaks = []
    for _ in range(args.rounds):
        peaks.append(matmul_flops_per_second(model.device, model.dtype))
        for way in WAYS:
            select(way)
            reset_peak_memory(model.device)
            seconds[way].append(timed(partial(encode, way, texts), model.device))
            memory[way] = max(memory[way], peak_memory(model.device))
            progress.update()
    select("unfolded")  # as it came, for the next texts
    peak = statistics.median(peaks)
    median = {way: statistics.median(seconds[way]) for way in WAYS}
    flops = {way: useful_flops(model.config, lengths, way) for way in WAYS}
    name = "queries" if instruction else "passages"
    quartiles = "/".join(f"{q:.0f}" for q in statistics.quantiles(lengths, n=4))
    print(f"{name}: {len(texts)} texts, {quartiles} tokens (quartiles); matmul peak {peak / 1e9:,.0f} GFLOP/s")
    ratio = median["folded"] / median["mean"] / (flops["folded"] / flops["mean"])
    print(f"{name}: folded over mean, time by FLOPs: {ratio:.3f}")
    sizes = (sum(p.numel() * p.element_size() for p in block.parameters()) / 1e9 for block in (pooling, folded))
    print("{}: weights of the latent attention: unfolded {:.3f} GB, folded {:.3f} GB".format(name, *sizes))
    table = []
    for way in WAYS:
        speedups = [r / w for r, w in zip(seconds["released"], seconds[way])]
        rate = flops[way] / median[way]
        table.append(
            f"| {name} | {way} | {len(texts) / median[way]:,.1f} | {sum(lengths) / median[way]:,.0f} | "
            f"{statistics.median(speedups):.2f} | {min(speedups):.2f}-{max(speedups):.2f} | {rate / 1e9:,.1f} | "
            f"{100 * rate / peak:.0f} | {memory[way]:.2f} |"
        )
    return table


def check_agreement(select: Callable, encode: Callable, texts: list[str], args: argparse.Namespace) -> None:
    """Checks that `unfolded` and `folded` compute what `released` does, and that `mean` does not."""
    embeddings = {}
    for way in WAYS:
        select(way)
        embeddings[way] = encode(way, texts).float()
    for way in WAYS[1:]:
        distance = (1 - torch.cosine_similarity(embeddings[way], embeddings["released"])).max().item()
        agrees = distance < (1e-5 if args.dtype == "float32" else 1e-2)
        if agrees != (way != "mean"):
            raise AssertionError(f"{way} is at a cosine distance of {distance:.2g} from released")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, help="default: 10 of smollm2's 30, all 32 of mistral-7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--queries", type=int, default=256, help="number of short texts")
    parser.add_argument("--passages", type=int, default=64, help="number of long texts")
    parser.add_argument("--passage_words", type=int, default=120, help="words of a long text, at least")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_tokens", type=int, help="of encode; default as encode's")
    parser.add_argument("--released_list", type=int, default=1024, help="texts of a call, for the released way")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    layers = args.layers or {"smollm2": 10, "mistral-7b": 32}[args.shape]
    sentences, passages = real_texts(args.passage_words)
    model = random_model(args.shape, layers, args.device, getattr(torch, args.dtype))
    model.tokenizer = train_tokenizer(sentences + passages)
    assert isinstance(model.latent_attention_model, LatentAttention)
    generator = torch.Generator().manual_seed(0)

    def sample(texts: list[str], number: int) -> list[str]:
        return [texts[i % len(texts)] for i in torch.randperm(max(number, len(texts)), generator=generator)[:number]]

    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{args.shape}, {layers} layers, {args.dtype}; {device}, {platform.processor() or platform.machine()}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {date.today()}, {args.rounds} rounds")
    with tqdm(total=2 * args.rounds * len(WAYS), desc="Timing") as progress:
        table = measure(model, sample(sentences, args.queries), INSTRUCTION, args, progress)
        table += measure(model, sample(passages, args.passages), "", args, progress)
    print("| texts | way | texts/s | tokens/s | x released | range | useful GFLOP/s | % of peak | peak GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
