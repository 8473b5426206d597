"""Writes a checkpoint that servers and libraries know without our code: the base's own architecture, plain pooling.

    python train/export.py --model runs/mine --output_dir runs/mine-stock --pool_instructions

For models with mean or end-token pooling. What is written opens in plain `SentenceTransformer(folder)` and in stock
vLLM (`vllm serve folder --runner pooling`). Stock engines pool the instruction's tokens, too, so a model that was
trained without them is refused unless `--pool_instructions` says otherwise: its embeddings differ from `encode`'s.
Train with `is_mask_instruction: false` to lose nothing. A latent attention cannot be written so; serve/vllm_plugin.py
serves it. Bidirectional models need an engine on transformers 5.2 or newer, or one that reads `is_causal` itself: older
versions of transformers attend causally, without a word.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel, HfArgumentParser, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.modeling_nvembed import NVEmbedModel, rope_settings
from nvembed.texts_nvembed import save_tokenizer
from nvembed.train.card import write_exported_card
from nvembed.train.certificate import copy_certificate
from nvembed.train.checkpoints import check_output_dir, quantized_by, staged
from nvembed.train.released import append_eos


logger = logging.getLogger(__name__)

POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
MODE_OF = {"mean": "mean_tokens", "eos": "lasttoken"}
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout",
    "bos_token_id", "eos_token_id",
)  # fmt: skip


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "Checkpoint with mean or end-token pooling: folder or Hub name."})
    output_dir: str = field(metadata={"help": "Folder to write; must not hold a checkpoint."})
    pool_instructions: bool = field(
        default=False,
        metadata={"help": "Export a model that was trained with masked instructions, although engines pool them."},
    )


def check_exportable(config: NVEmbedConfig, name: str, pool_instructions: bool) -> None:
    """
    Raises:
        ValueError: it is quantized, its embeddings are projected or centred, the pooling is none of stock engines', or
            they would pool what the model was trained to leave out.
    """
    if (method := quantized_by(config)) is not None:
        raise ValueError(f"{name} is quantized ({method}): export the checkpoint that it was made from")
    if config.latent_attention_config.projection_dim is not None:
        raise ValueError(
            f"{name} projects its embeddings to {config.hidden_size} dimensions (projection_dim), which this export "
            "has no module for: use it by AutoModel or SentenceTransformer"
        )
    if config.latent_attention_config.subtract_mean:
        raise ValueError(
            f"{name} subtracts a mean from its embeddings (subtract_mean), which stock engines do not: export the "
            "checkpoint that train/center.py made it from"
        )
    if config.pooling_type not in MODE_OF:
        raise ValueError(
            f"{name} has pooling_type {config.pooling_type!r}, which stock engines do not have; they have "
            f"{' and '.join(map(repr, MODE_OF))}. Serve it in vLLM by our plugin: see docs/serving.md"
        )
    if config.is_mask_instruction and config.pooling_type == "mean" and not pool_instructions:
        raise ValueError(
            f"{name} leaves its instructions out of the mean (is_mask_instruction), and stock engines cannot: texts "
            "with an instruction would get other embeddings than encode's. Train with is_mask_instruction: false, or "
            "give --pool_instructions and measure what it costs"
        )


def family_config(config: NVEmbedConfig) -> PretrainedConfig:
    """The decoder's config in its own family.

    Raises:
        ValueError: the decoder has the switches of two families.
    """
    text = config.text_config
    if text.qkv_bias and text.qk_norm:
        raise ValueError("the decoder has both qkv_bias and qk_norm, which is no family that stock engines know")
    kind = Qwen3Config if text.qk_norm else Qwen2Config if text.qkv_bias else LlamaConfig
    if kind is Qwen2Config and text.head_dim * text.num_attention_heads != text.hidden_size:
        raise ValueError(f"head_dim is {text.head_dim}, and a Qwen2's follows from its hidden size: {text.hidden_size}")
    told = {name: getattr(text, name) for name in FIELDS if getattr(text, name, None) is not None}
    rope = rope_settings(text)
    if rope["rope_type"] == "default":
        rope = {name: rope[name] for name in ("rope_type", "rope_theta")}
    told["rope_parameters"] = rope
    if kind is Qwen2Config:
        told.pop("head_dim", None)
    is_causal = config.mask_type == "c"
    return kind(
        **told, is_causal=is_causal, use_bidirectional_attention=not is_causal, sliding_window=None,
        tie_word_embeddings=False, pad_token_id=None,
    )  # fmt: skip


def write_rope_for_transformers_4(file: Path) -> None:
    """Adds the two fields in which transformers 4 and older servers look for what 5 keeps in `rope_parameters`."""
    content = json.loads(file.read_text(encoding="utf-8"))
    rope = dict(content["rope_parameters"])
    content["rope_theta"] = rope.pop("rope_theta")
    content["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(model: NVEmbedModel, output_dir: str, base: str | None = None) -> None:
    """Writes the decoder, tokenizer and sentence-transformers' files of a model that `check_exportable` lets pass.

    Args:
        base: the checkpoint that the model was loaded from, whose certificate and card go with it; None: neither.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
        ValueError: as `family_config`.
    """
    config = model.config
    with torch.device("meta"):
        decoder = AutoModel.from_config(family_config(config), dtype=model.dtype)
    decoder.load_state_dict(model.embedding_model.state_dict(), assign=True)
    tokenizer = append_eos(model.tokenizer) if config.add_eos else model.tokenizer
    positions = config.text_config.max_position_embeddings
    modes = {f"pooling_mode_{mode}": mode == MODE_OF[config.pooling_type] for mode in POOLING_MODES}
    parts = ["Transformer", "Pooling", *(["Normalize"] if config.latent_attention_config.output_normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{part}" if i else "", "type": f"sentence_transformers.models.{part}"}
        for i, part in enumerate(parts)
    ]
    files = {
        "modules.json": modules,
        # The older form, which text-embeddings-inference and older servers read.
        "1_Pooling/config.json": {"word_embedding_dimension": config.hidden_size} | modes | {"include_prompt": True},
        "sentence_bert_config.json": {
            "max_seq_length": min(config.max_seq_length or positions, positions), "do_lower_case": False,
        },
        "config_sentence_transformers.json": {
            "prompts": config.prompts, "default_prompt_name": config.default_prompt_name,
            "similarity_fn_name": config.similarity_fn_name,
        },
    }  # fmt: skip
    with staged(output_dir) as folder:
        decoder.save_pretrained(folder)
        write_rope_for_transformers_4(folder / "config.json")
        save_tokenizer(tokenizer, str(folder))
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if len(parts) == 3:
            (folder / "2_Normalize").mkdir()
        if base is not None:
            copy_certificate(base, None, folder)
            text = f"`{base.rstrip('/').split('/')[-1]}` of nvembed, written by `train/export.py` for stock servers."
            write_exported_card(base, folder, output_dir, text)


def main(args: ExportArguments) -> None:
    check_output_dir(args.output_dir)
    config = NVEmbedConfig.from_pretrained(args.model)
    check_exportable(config, args.model, args.pool_instructions)
    if config.is_mask_instruction and config.pooling_type == "mean":
        logger.warning(
            f"{args.model} was trained without its instructions in the mean; in {args.output_dir} they are in it. "
            "Measure both before you serve it."
        )
    if config.mask_type == "b":
        logger.warning(
            f"{args.output_dir} says is_causal: false, which transformers reads from 5.2 on and ignores before."
        )
    export(NVEmbedModel.from_pretrained(args.model, dtype="auto"), args.output_dir, args.model)


if __name__ == "__main__":
    main(*HfArgumentParser(ExportArguments).parse_args_into_dataclasses())
