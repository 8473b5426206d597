"""Makes an untrained NV-Embed checkpoint from a Mistral, Llama or Qwen decoder, or converts a released NV-Embed.

    python train/init_checkpoint.py --base mistralai/Mistral-7B-v0.1 --output_dir runs/mistral
    python train/init_checkpoint.py --base models/smollm2.gguf --num_layers 8 --output_dir runs/smollm2
    python train/init_checkpoint.py --from_released nvidia/NV-Embed-v2 --output_dir runs/nv-embed-v2

An untrained embedding is the mean of the decoder's states: the new block adds nothing yet (see `NVEmbedModel`). A
converted checkpoint keeps the released weights, hard-linked where possible, else copied, and gets the code and files
with which today's transformers and sentence-transformers load it.
"""

import json
import logging
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    HfArgumentParser,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.eval.tasks.instructions import task_prompts
from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.train.card import write_base_card
from nvembed.train.certificate import untrained, write_certificate
from nvembed.train.checkpoints import check_output_dir, write_checkpoint
from nvembed.train.released import between, convert_released, fold_released


logger = logging.getLogger(__name__)

# model_type -> the switches of `BidirectionalMistralConfig` that make Mistral's layers this family's.
SUPPORTED = {
    "mistral": {},
    "ministral": {},
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
# What keeps others out, where their config does not show it.
DIFFERENT = {
    "nemotron": "LayerNorm with 1 + weight, a squared ReLU without a gate, and rotation of a part of each head",
    "gemma": "norms with 1 + weight, and scaled embeddings",
    "gemma2": "norms with 1 + weight before and after each block, scaled embeddings, and capped scores",
    "gemma3_text": "norms with 1 + weight before and after each block, and scaled embeddings",
    "granite": "factors on embeddings, attention and residuals",
    "cohere": "attention and MLP side by side behind one LayerNorm, and interleaved rotation",
    "smollm3": "layers without rotary positions",
    "ministral3": "queries scaled by position",
    "helium": "interleaved rotation",
}
OF_WINDOWS = ("layer_types", "use_sliding_window", "max_window_layers")


@dataclass
class InitArguments:
    output_dir: str = field(metadata={"help": "Folder to write; must not hold a checkpoint."})
    base: str | None = field(default=None, metadata={"help": "Decoder: Hub name, local folder, or .gguf file."})
    from_released: str | None = field(
        default=None, metadata={"help": "Instead of a base: a released NV-Embed, Hub name or local folder."}
    )
    fold_latent_attention: bool = field(
        default=False, metadata={"help": "Of a released NV-Embed: fold it, for evaluation alone; loads it into memory."}
    )
    tokenizer_adds_eos: bool = field(
        default=False,
        metadata={"help": "Of a released NV-Embed: write a tokenizer that appends </s> by itself, as vLLM needs it."},
    )
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file within the Hub repository or folder."})
    num_layers: int | None = field(
        default=None, metadata={"help": "Keep only the first layers, this many; default all."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Dtype of the weights.", "choices": ["float32", "bfloat16"]}
    )
    pooling_type: str = field(default="latent_attention", metadata={"help": "See NVEmbedConfig."})
    mask_type: str = field(default="b", metadata={"help": "b: bidirectional, c: causal."})
    is_mask_instruction: bool = field(
        default=True, metadata={"help": "Leave instructions out of the pooling; false for stock servers."}
    )
    num_latents: int = field(default=512, metadata={"help": "Latents (paper: 512)."})
    num_cross_heads: int = field(default=8, metadata={"help": "Heads of the latent attention (paper: 8)."})
    cross_dim_head: int | None = field(default=None, metadata={"help": "Width of a head; default the hidden size."})
    seed: int = field(default=0, metadata={"help": "Of the new weights."})


def init_model(args: InitArguments) -> NVEmbedModel:
    """Reads the decoder and builds the model around it.

    Raises:
        ValueError: the base has another layout than Mistral, Llama, Qwen2 or Qwen3, or fewer than `num_layers` layers.
    """
    base, gguf = args.base, {"gguf_file": args.gguf_file} if args.gguf_file else {}
    if Path(base).suffix == ".gguf":
        if args.gguf_file is not None:
            raise ValueError(f"base is {base}, a file, and gguf_file {args.gguf_file} another: leave one out")
        base, gguf = str(Path(base).parent), {"gguf_file": Path(base).name}
    for name in ("num_latents", "num_cross_heads", "cross_dim_head"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; it must be 1 or more")
    try:
        decoder_config = AutoConfig.from_pretrained(base, **gguf)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{args.base} is neither a local decoder folder or .gguf file nor a Hub model that can be reached: {error}"
        ) from error
    _check_layout(args, decoder_config)
    tokenizer = _embedding_tokenizer(AutoTokenizer.from_pretrained(base, **gguf), decoder_config, bool(gguf))
    check_token_ids(tokenizer, decoder_config.vocab_size, args.base)

    left_out = ("name_or_path", *OF_WINDOWS)
    fields = {key: value for key, value in decoder_config.to_dict().items() if not key.endswith(left_out)}
    fields.update(
        num_hidden_layers=args.num_layers or decoder_config.num_hidden_layers,
        sliding_window=None,
        tie_word_embeddings=False,  # there is no output layer to tie to
        **SUPPORTED[decoder_config.model_type],
    )
    hidden = decoder_config.hidden_size
    config = NVEmbedConfig(
        text_config=fields,
        latent_attention_config={
            "num_latents_value": args.num_latents,
            "num_cross_heads": args.num_cross_heads,
            "cross_dim_head": args.cross_dim_head or hidden,
            "hidden_dim": hidden,
            "latent_dim": hidden,
        },
        pooling_type=args.pooling_type,
        mask_type=args.mask_type,
        is_mask_instruction=args.is_mask_instruction,
        add_eos=False,  # the tokenizer does it
        prompts=task_prompts(),
    )
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    model = AutoModel.from_config(config, dtype=dtype)
    decoder = AutoModel.from_pretrained(base, dtype=dtype, **gguf)
    _load_decoder(model, decoder.state_dict(), base)
    model.tokenizer = tokenizer
    return model


def _check_layout(args: InitArguments, config) -> None:
    if config.model_type not in SUPPORTED:
        difference = DIFFERENT.get(config.model_type) or _difference_of_tensors(config)
        raise ValueError(
            f"{args.base} is a {config.model_type!r} model, which differs from Mistral's layers: {difference}. The "
            f"base must be one of {', '.join(map(repr, SUPPORTED))}"
        )
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise ValueError(f"{args.base} has {name}: biases that Mistral's layers do not have; take another base")
    if args.num_layers is not None and not 1 <= args.num_layers <= config.num_hidden_layers:
        raise ValueError(f"num_layers is {args.num_layers}; {args.base} has layers 1 to {config.num_hidden_layers}")
    windowed = sliding_layers(config)
    if windowed:
        logger.warning(
            f"{args.base}: {windowed} of {config.num_hidden_layers} layers attend within a window of "
            f"{config.sliding_window} tokens; here they attend to the whole text."
        )


def sliding_layers(config) -> int:
    """How many layers of a decoder attend within a sliding window."""
    if getattr(config, "sliding_window", None) is None:
        return 0
    if getattr(config, "layer_types", None) is not None:
        return config.layer_types.count("sliding_attention")
    return config.num_hidden_layers if config.model_type == "mistral" else 0


def _difference_of_tensors(config) -> str:
    """The first tensors by which a family's layers differ from Mistral's."""
    try:
        with torch.device("meta"):
            theirs = set(AutoModel.from_config(config).state_dict())
    except Exception as error:  # of a family that transformers cannot build as a decoder
        return f"no decoder can be made of it ({error})"
    mistral = MistralConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1)
    mistral.num_hidden_layers = getattr(config, "num_hidden_layers", 1)
    with torch.device("meta"):
        ours = set(AutoModel.from_config(mistral).state_dict())
    if theirs == ours:
        return "its tensors have Mistral's names, but what it computes with them was never compared"
    parts = (("it has", theirs - ours), ("it lacks", ours - theirs))
    return "; ".join(f"{verb} {', '.join(sorted(names)[:3])}" for verb, names in parts if names)


def _load_decoder(model: NVEmbedModel, weights: dict[str, torch.Tensor], base: str) -> None:
    wanted = model.embedding_model.state_dict()
    kept = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("layers.") or int(name.split(".")[1]) < model.config.text_config.num_hidden_layers
    }
    if kept.keys() != wanted.keys():
        raise ValueError(
            f"{base} does not have the tensors that its model_type promises: unknown tensors "
            f"{sorted(kept.keys() - wanted.keys())[:3]}, missing tensors {sorted(wanted.keys() - kept.keys())[:3]}"
        )
    model.embedding_model.load_state_dict(kept)


def _embedding_tokenizer(tokenizer, config, from_gguf: bool) -> PreTrainedTokenizerFast:
    """The base's tokenizer, changed to write `<s>` text `</s>` and to pad on the right.

    The tokenizer itself adds the end token, so every library that uses the checkpoint gets it and truncation keeps it.
    A pad token without a row in the embedding is replaced by `</s>`.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if from_gguf:  # transformers reads the ids of a GGUF file into the config, and not always into the tokenizer
        bos, eos = tokenizer.convert_ids_to_tokens([config.bos_token_id, config.eos_token_id])
    if eos is None:
        raise ValueError("the base's tokenizer has no end token, which every text needs; set its eos_token")
    bos = bos or eos  # every text must start with `<s>`: the instruction mask relies on it
    backend, pad = tokenizer.backend_tokenizer, tokenizer.pad_token
    if pad is not None and tokenizer.pad_token_id >= config.vocab_size:
        backend, pad = _without_token(backend, pad), None
    backend.post_processor = between(bos, eos, tokenizer.convert_tokens_to_ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=tokenizer.unk_token,
        pad_token=pad or eos,
        padding_side="right",
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _without_token(backend: Tokenizer, token: str) -> Tokenizer:
    """The tokenizer without an added token, so that the same string in a text is tokenized as ordinary text."""
    content = json.loads(backend.to_str())
    content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] != token]
    if isinstance(content["model"].get("vocab"), dict):  # some tokenizers list added tokens here, too
        content["model"]["vocab"].pop(token, None)
    return Tokenizer.from_str(json.dumps(content))


def check_token_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int, base: str) -> None:
    """Raises a `ValueError` if the tokenizer has a token without a row in the embedding."""
    outside = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    if outside:
        token = min(outside, key=outside.get)
        raise ValueError(
            f"{base}: {len(outside)} tokens of the tokenizer have no row in the embedding, which has {vocab_size}: the "
            f"first is {token!r}, {outside[token]}. Take the tokenizer that belongs to the weights, or give the base "
            "rows for them: model.resize_token_embeddings(len(tokenizer))"
        )


def main(args: InitArguments) -> None:
    if (args.base is None) == (args.from_released is None):
        raise ValueError("name one of --base, a decoder, and --from_released, a released NV-Embed")
    if args.fold_latent_attention and args.from_released is None:
        raise ValueError("--fold_latent_attention is for --from_released: an untrained checkpoint needs its latents")
    if args.tokenizer_adds_eos and args.from_released is None:
        raise ValueError("--tokenizer_adds_eos is for --from_released: what --base makes has such a tokenizer")
    if args.from_released is not None:
        check_no_options_of_a_base(args)
        convert = fold_released if args.fold_latent_attention else convert_released
        convert(args.from_released, args.output_dir, args.tokenizer_adds_eos)
    else:
        check_output_dir(args.output_dir)
        write_checkpoint(init_model(args), args.output_dir, partial(describe, base=args.base))


def check_no_options_of_a_base(args: InitArguments) -> None:
    """Raises a `ValueError` if an option is set that is for a decoder: a released NV-Embed stays as it is."""
    of_released = ("output_dir", "base", "from_released", "fold_latent_attention", "tokenizer_adds_eos")
    for option in fields(args):
        if option.name not in of_released and getattr(args, option.name) != option.default:
            raise ValueError(
                f"--{option.name} is for --base: a released NV-Embed keeps what it has "
                f"({option.name} {getattr(args, option.name)!r} would change nothing)"
            )


def describe(folder: Path, base: str) -> None:
    write_base_card(folder, base)
    write_certificate(folder, untrained(base))


if __name__ == "__main__":
    main(*HfArgumentParser(InitArguments).parse_args_into_dataclasses())
