"""NV-Embed: a bidirectional Mistral decoder, a latent attention over its token states, and one embedding per text.

Source: Lee et al., "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models",
arXiv 2405.17428. Modules have the names of the released weights. The file reads in the order of the computation:
decoder, poolings, model and `encode`; files and the sentence-transformers module come last.
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import load_state_dict
from transformers.utils import ModelOutput, cached_file, find_adapter_config_file, is_peft_available, logging
from transformers.utils.logging import tqdm

from .configuration_nvembed import BidirectionalMistralConfig, LatentAttentionConfig, NVEmbedConfig
from .texts_nvembed import (
    PackedLayout,
    PaddedLayout,
    TokenizedText,
    check_characters,
    check_number,
    check_texts,
    length_sorted_batches,
    load_tokenizer,
    pack,
    pad,
    save_tokenizer,
    tokenize,
)


IS_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

logger = logging.get_logger(__name__)

# Texts tokenized and sorted at a time: enough batches for sorting to help, few enough to tokenize in a second.
WINDOW_TEXTS = 4096


# --- Decoder ---------------------------------------------------------------------------------------------------------


# RoPE types whose frequencies do not depend on the length of the text, and the settings each requires.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def rope_settings(config: BidirectionalMistralConfig) -> dict:
    """RoPE's type, theta and scaling, from a config written by any version of transformers.

    Raises:
        ValueError: the type is unknown or depends on the text's length, a setting is missing, or the rotation is
            partial.
    """
    # transformers 5 keeps theta and scaling in `rope_parameters`, transformers 4 in two fields.
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    rope.setdefault("rope_type", rope.get("type", "default"))  # "type" before transformers 4.43
    if rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = config.max_position_embeddings
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"rope_type is {rope['rope_type']!r}; supported are {', '.join(ROPE_TYPES)}, whose frequencies do not "
            "depend on the length of the text"
        )
    for name in ROPE_TYPES[rope["rope_type"]]:
        if rope.get(name) is None:
            raise ValueError(f"rope_type {rope['rope_type']!r} needs {name}, and the config has only {sorted(rope)}")
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if part != 1.0:
        raise ValueError(f"partial_rotary_factor is {part}; only decoders that rotate the whole head are supported")
    return rope


def inverse_frequencies(config: BidirectionalMistralConfig, device: torch.device) -> tuple[Tensor, float]:
    """RoPE's inverse frequencies, fp32 `[head_dim / 2]`, and the factor on cos and sin.

    The formulas are those of transformers 5's `ROPE_INIT_FUNCTIONS`, bit for bit. They are repeated here because
    those differ between versions (4.51 computes another factor for yarn) and create tensors on the ambient device,
    which is `meta` while a checkpoint loads. They are computed in every forward instead of being kept in a buffer: a
    buffer is lost when a model loads through the meta device and rounded when it is cast to bf16, and 64 powers cost
    nothing.

    Raises:
        ValueError: as `rope_settings`.
    """
    rope = rope_settings(config)
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    powers = rope["rope_theta"] ** exponents
    frequencies = 1.0 / powers
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":
        return _llama3_frequencies(frequencies, rope), 1.0
    if rope["rope_type"] == "yarn":
        return _yarn_frequencies(powers, rope, config.head_dim), _yarn_attention_factor(rope)
    return frequencies, 1.0


def _llama3_frequencies(frequencies: Tensor, rope: dict) -> Tensor:
    """Llama 3.1's: wavelengths beyond the original context are stretched, short ones kept, those between blended."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    result = torch.where(wavelengths < original / high, frequencies, blended)
    return torch.where(wavelengths > original / low, frequencies / factor, result)


def _yarn_frequencies(powers: Tensor, rope: dict, head_dim: int) -> Tensor:
    """YaRN's (arXiv 2309.00071): fast dimensions are kept, slow ones stretched, with a linear ramp between them."""
    theta, original = rope["rope_theta"], rope["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        """The dimension that makes this many rotations within the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    positions = torch.arange(head_dim // 2, device=powers.device, dtype=torch.float32)
    kept = 1 - ((positions - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_attention_factor(rope: dict) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def scale(mscale: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * mscale * math.log(rope["factor"]) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `[..., tokens, heads, head_dim]` by angles given as `[tokens, 1, head_dim]`.

    Dimension i is paired with i + head_dim / 2; `sin` comes with its first half negated.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class MistralRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # as Mistral does: statistics in fp32, the weight applied in the input's dtype
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MistralAttention(nn.Module):
    """Grouped-query attention with rotary positions, bidirectional unless `is_causal`."""

    def __init__(self, config: BidirectionalMistralConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = MistralRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = MistralRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: PaddedLayout | PackedLayout, is_causal: bool
    ) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # Under autocast the states, and so cos and sin, are fp32; attention runs in the projections' dtype.
        q, k = (rotate(x, cos, sin).to(v.dtype) for x in (self.q_norm(q), self.k_norm(k)))
        out = layout.attend(q, k, v, is_causal, self.dropout if self.training else 0.0)
        return self.o_proj(out.flatten(-2))


class MistralMLP(nn.Module):
    def __init__(self, config: BidirectionalMistralConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MistralDecoderLayer(nn.Module):
    def __init__(self, config: BidirectionalMistralConfig):
        super().__init__()
        self.self_attn = MistralAttention(config)
        self.mlp = MistralMLP(config)
        self.input_layernorm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: PaddedLayout | PackedLayout, is_causal: bool
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, is_causal)
        return x + self.mlp(self.post_attention_layernorm(x))


def embed_rows(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """`embedding(ids)`; of a table in 8 bits, where torchao would dequantize all of it, these rows alone."""
    table = embedding.weight
    if not hasattr(table, "qdata"):
        return embedding(ids)
    return (table.qdata[ids].float() * table.scale.float()[ids]).to(table.dtype)


class BidirectionalMistralModel(nn.Module):
    """Mistral's layers with bidirectional (`mask_type="b"`) or causal (`"c"`) attention; padding is always masked.

    With `qkv_bias` they are Qwen2's, with `qk_norm` Qwen3's; Llama's are Mistral's.
    """

    def __init__(self, config: BidirectionalMistralConfig, mask_type: str):
        super().__init__()
        rope_settings(config)  # fail now on an unknown type, not in the first forward
        self.config = config
        self.mask_type = mask_type
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MistralDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor | None,
        layout: PaddedLayout | PackedLayout | None = None,
        inputs_embeds: Tensor | None = None,
        collected: list[Tensor] | None = None,
    ) -> Tensor:
        """Maps token ids, `[batch, tokens]` or `[tokens]` depending on `layout`, to states `[..., hidden]`.

        Without `layout`, each row is one text without padding. `inputs_embeds`, `[..., hidden]`, replaces ids. The
        inputs of every layer are appended to `collected`, a list.
        """
        x = embed_rows(self.embed_tokens, input_ids) if inputs_embeds is None else inputs_embeds
        layout = layout or PaddedLayout(x.shape[-2])
        cos, sin = self.rotations(x, layout)
        for layer in self.layers:
            if collected is not None:
                collected.append(x)
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, layout, self.mask_type == "c", use_reentrant=False)
            else:
                x = layer(x, cos, sin, layout, self.mask_type == "c")
        return self.norm(x)

    def rotations(self, x: Tensor, layout: PaddedLayout | PackedLayout) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens' angles in `x`'s dtype, `[tokens, 1, head_dim]`; see `rotate`."""
        frequencies, scaling = inverse_frequencies(self.config, x.device)
        angles = torch.outer(layout.positions(x.device).float(), frequencies).unsqueeze(-2)  # the same for every head
        cos, sin = ((scaling * f(angles)).to(x.dtype) for f in (torch.cos, torch.sin))
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


# --- Pooling: token states -> token states -> one vector a text ------------------------------------------------------


class MeanPooling(nn.Module):
    """The mean of the token states; base class of the other poolings, which override `mix` or `reduce`."""

    def __init__(self, config: LatentAttentionConfig):
        super().__init__()
        self.output_normalize = config.output_normalize
        self.projection = nn.Identity()
        if config.projection_dim is not None:
            self.projection = nn.Linear(config.hidden_dim, config.projection_dim, bias=False)
        width = config.projection_dim or config.hidden_dim
        # A buffer, since it is a constant in training, too.
        self.register_buffer("mean_embedding", torch.zeros(width) if config.subtract_mean else None)

    def forward(self, states: Tensor, layout: PaddedLayout | PackedLayout) -> Tensor:
        """Maps states, `[batch, tokens, hidden]` or `[tokens, hidden]` depending on `layout`, to the embedding's width.

        The projection and the constant come before the pooling, which they commute with, so that what pools elsewhere
        (vLLM) needs no step more.
        """
        states = self.projection(self.mix(states, layout))
        return states if self.mean_embedding is None else states - self.mean_embedding

    def mix(self, states: Tensor, layout: PaddedLayout | PackedLayout) -> Tensor:
        """Token states to token states of the same shape."""
        return states

    def pool(self, states: Tensor, pool_mask: Tensor, layout: PaddedLayout | PackedLayout) -> Tensor:
        """Reduces states to fp32 embeddings `[texts, hidden]`; `pool_mask` is 1 for the tokens that count."""
        embeddings = self.reduce(states, pool_mask, layout)
        return F.normalize(embeddings, dim=-1) if self.output_normalize else embeddings

    def reduce(self, states: Tensor, pool_mask: Tensor, layout: PaddedLayout | PackedLayout) -> Tensor:
        weights = pool_mask.to(states.device).unsqueeze(-1).float()
        return layout.sum(states * weights) / layout.sum(weights)


class EosPooling(MeanPooling):
    """The state of the last token, `</s>` (another token in a text truncated to `max_length`)."""

    def reduce(self, states: Tensor, pool_mask: Tensor, layout: PaddedLayout | PackedLayout) -> Tensor:
        return layout.last(states).float()


class ResidualOutput(nn.Linear):
    """The last linear map of a residual block, initialized to zero so that an untrained block adds nothing."""


class Attention(nn.Module):
    """Multi-head attention from `x` to `context`; the width of a head does not depend on that of the states."""

    def __init__(self, config: LatentAttentionConfig, context_dim: int):
        super().__init__()
        self.head_dim = config.cross_dim_head
        inner = config.num_cross_heads * config.cross_dim_head
        self.to_q = nn.Linear(config.hidden_dim, inner, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * inner, bias=False)
        self.to_out = ResidualOutput(inner, config.hidden_dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, layout: PaddedLayout | PackedLayout) -> Tensor:
        """Maps `x` `[..., tokens, hidden]` and `context` `[..., keys, width]`, both in `layout`, to `x`'s shape."""
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        return self.to_out(layout.attend(q, k, v).flatten(-2))


class GEGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, dim * mult * 2), GEGLU(), ResidualOutput(dim * mult, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PreNorm(nn.Module):
    """`fn` after a LayerNorm, with a second LayerNorm for the context if there is one."""

    def __init__(self, dim: int, fn: nn.Module, context_dim: int | None = None):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim) if context_dim is not None else None


class LatentAttention(MeanPooling):
    """Token states attend to r trainable latents; an MLP and the mean follow (paper section 3.2, equations 1-2)."""

    def __init__(self, config: LatentAttentionConfig):
        super().__init__(config)
        attention = Attention(config, config.latent_dim)
        self.cross_attend_blocks = nn.ModuleList(
            [
                PreNorm(config.hidden_dim, attention, config.latent_dim),
                PreNorm(config.hidden_dim, FeedForward(config.hidden_dim)),
            ]
        )
        self.latents = nn.Parameter(torch.empty(config.num_latents_value, config.latent_dim))

    def mix(self, states: Tensor, layout: PaddedLayout | PackedLayout) -> Tensor:
        attend, feed = self.cross_attend_blocks
        context = attend.norm_context(self.latents).unsqueeze(0)
        # All tokens of all texts attend to the same latents: as one long row, their keys are computed once.
        x = states.flatten(0, -2).unsqueeze(0)
        x = x + attend.fn(attend.norm(x), context, PaddedLayout(x.shape[1]))
        x = x + feed.fn(feed.norm(x))
        return x.view_as(states)


class Float32Linear(nn.Linear):
    """Computes in fp32 regardless of the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class FoldedLatentAttention(MeanPooling):
    """A trained latent attention with everything that does not depend on the text computed in advance.

    Once trained, the latents are constants, and so are the keys K and values V of each head. The head's
    `softmax(x Wq K^T) V Wo` then equals `softmax(x A^T) B^T` with `A = K Wq^T` and `B = Wo^T V^T`: two linear maps with
    a softmax over each head's latents between them; the LayerNorm's weights go into the first. The algebra is exact.
    At the released size, 537 M parameters become 33.6 M, not counting the MLP. For evaluation only: training changes
    the latents.
    """

    def __init__(self, config: LatentAttentionConfig):
        super().__init__(config)
        dim, scores = config.hidden_dim, config.num_cross_heads * config.num_latents_value
        self.heads = config.num_cross_heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        # In fp32, like the scores inside the unfolded form's fused attention: bf16 rounds large scores coarsely.
        self.to_scores = Float32Linear(dim, scores)
        self.to_out = nn.Linear(scores, dim, bias=False)
        self.feed = PreNorm(dim, FeedForward(dim))

    def mix(self, states: Tensor, layout: PaddedLayout | PackedLayout) -> Tensor:
        if self.training:
            raise RuntimeError("the latent attention is folded, which is for evaluation: train the unfolded checkpoint")
        scores = self.to_scores(self.norm(states.float())).unflatten(-1, (self.heads, -1))
        weights = scores.softmax(-1).flatten(-2)
        x = states + self.to_out(weights.to(states.dtype))
        return x + self.feed.fn(self.feed.norm(x))

    @classmethod
    @torch.no_grad()
    def fold(cls, block: LatentAttention, config: LatentAttentionConfig) -> "FoldedLatentAttention":
        """Folds `block`, computing in fp64 (fp32 on Apple's GPUs, which lack fp64) and rounding once."""
        attend, feed = block.cross_attend_blocks
        width = config.cross_dim_head
        wide = torch.float32 if block.latents.device.type == "mps" else torch.float64
        norm, norm_context = (deepcopy(norm).to(wide) for norm in (attend.norm, attend.norm_context))
        context = norm_context(block.latents.to(wide))
        to_scores, bias, to_out = [], [], []
        # One head at a time: all heads of a released checkpoint would take 4 GB in fp64.
        for head in range(config.num_cross_heads):
            part = slice(head * width, (head + 1) * width)
            to_k, to_v = (weight[part].to(wide) for weight in attend.fn.to_kv.weight.chunk(2))
            scores = width**-0.5 * (context @ to_k.T) @ attend.fn.to_q.weight[part].to(wide)  # A, [latents, hidden]
            scores -= scores.mean(0)  # softmax ignores what all latents share, and smaller weights round less
            to_scores.append(scores * norm.weight)
            bias.append(scores @ norm.bias)
            to_out.append(attend.fn.to_out.weight[:, part].to(wide) @ (context @ to_v.T).T)  # B, [hidden, latents]
        folded = cls(config).to(block.latents.device, block.latents.dtype).eval()
        folded.to_scores.weight.copy_(torch.cat(to_scores))
        folded.to_scores.bias.copy_(torch.cat(bias))
        folded.to_out.weight.copy_(torch.cat(to_out, dim=1))
        folded.feed.load_state_dict(feed.state_dict())
        folded.projection.load_state_dict(block.projection.state_dict())
        folded.mean_embedding = block.mean_embedding
        return folded


class SelfAttention(MeanPooling):
    """A self-attention layer, an MLP and the mean: the paper's ablation of the latents (section 3.2, table 3)."""

    def __init__(self, config: LatentAttentionConfig):
        super().__init__(config)
        dim = config.hidden_dim
        self.self_attend_blocks = nn.ModuleList([PreNorm(dim, Attention(config, dim)), PreNorm(dim, FeedForward(dim))])

    def mix(self, states: Tensor, layout: PaddedLayout | PackedLayout) -> Tensor:
        attend, feed = self.self_attend_blocks
        normed = attend.norm(states)
        states = states + attend.fn(normed, normed, layout)
        return states + feed.fn(feed.norm(states))


POOLINGS = {
    "latent_attention": LatentAttention,
    "mean": MeanPooling,
    "eos": EosPooling,
    "self_attention": SelfAttention,
}


# --- Model -----------------------------------------------------------------------------------------------------------


@dataclass
class NVEmbedModelOutput(ModelOutput):
    """
    Args:
        sentence_embeddings: fp32 `[batch, hidden]`; without a pool mask the token states, as in the released code.
        last_hidden_state: token states after the latent attention, `[batch, tokens, hidden]`, or `[tokens, hidden]`
            for packed texts.
        hidden_states: if asked for, the token embeddings, the decoder's states after each layer, and, in place of the
            last of these, the states behind its final norm; of the shape of `last_hidden_state`.
    """

    sentence_embeddings: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class NVEmbedModel(PreTrainedModel):
    """The embedding model: `encode` for texts, `forward` for tensors.

    A new model starts as its decoder's mean pooling: both residual blocks of the latent (or self-) attention end in
    a `ResidualOutput`, which is zero at first, so the embedding is exactly the mean of the decoder's states.
    """

    config_class = NVEmbedConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: NVEmbedConfig):
        super().__init__(config)
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.embedding_model = BidirectionalMistralModel(config.text_config, config.mask_type)
        # The released name for every pooling, so that `train/` finds the module it trains in full under one name.
        pooling = FoldedLatentAttention if config.latent_attention_is_folded else POOLINGS[config.pooling_type]
        self.latent_attention_model = pooling(config.latent_attention_config)
        # Of this model alone: accelerate looks for each when it shards.
        blocks = [pooling.__name__] if pooling not in (MeanPooling, EosPooling) else []
        self._no_split_modules = ["MistralDecoderLayer", *blocks]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.text_config.initializer_range
        if isinstance(module, ResidualOutput):
            nn.init.zeros_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, (nn.LayerNorm, MistralRMSNorm)):
            nn.init.ones_(module.weight)
        elif isinstance(module, LatentAttention):
            nn.init.normal_(module.latents, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding_model.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pool_mask: Tensor | None = None,
        lengths: list[int] | None = None,
        return_dict: bool | None = True,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **unused,
    ) -> NVEmbedModelOutput | tuple[Tensor]:
        """Maps token ids to embeddings, or to token states.

        Texts are rows, `[batch, tokens]`, or, with `lengths`, concatenated without padding, `[tokens]`.

        Args:
            attention_mask: 1 for tokens, 0 for padding, of the shape of `input_ids`; None: no padding.
            pool_mask: 1 for tokens that count in the pooling, of the shape of `input_ids`; None: no pooling. If it is
                shorter than `inputs_embeds`, these begin with virtual tokens (PEFT's prompt tuning), which never count.
            lengths: number of tokens of each packed text; see `pack`.
            return_dict: False: return a tuple of one tensor; `output_hidden_states` has no effect then.
            inputs_embeds: token embeddings `[..., hidden]` instead of `input_ids`.
            output_hidden_states: whether to return the states of every layer, too.
            unused: what PEFT's wrappers pass to every model; must be None or False.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given; `pool_mask` has another length.
            TypeError: an argument is asked for that the model does not have.
        """
        check_not_wrapped(self)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        for name, value in unused.items():
            if value is not None and value is not False:
                raise TypeError(f"forward() has no argument {name!r}")
        tokens = input_ids.shape[-1] if inputs_embeds is None else inputs_embeds.shape[-2]
        layout = PaddedLayout(tokens, attention_mask) if lengths is None else PackedLayout(lengths)
        collected = [] if output_hidden_states else None
        decoded = self.embedding_model(input_ids, layout, inputs_embeds, collected)
        hidden_states = None if collected is None else (*collected, decoded)
        states = self.latent_attention_model(decoded, layout)
        return_dict = return_dict is None or return_dict
        if pool_mask is None:
            return NVEmbedModelOutput(states, states, hidden_states) if return_dict else (states,)
        if inputs_embeds is not None and lengths is None and pool_mask.shape[-1] < tokens:
            pool_mask = F.pad(pool_mask, (tokens - pool_mask.shape[-1], 0))  # for PEFT's virtual tokens
        if pool_mask.shape[-1] != tokens:
            raise ValueError(f"pool_mask is for {pool_mask.shape[-1]} tokens, and there are {tokens}")
        embeddings = self.latent_attention_model.pool(states, pool_mask, layout)
        return NVEmbedModelOutput(embeddings, states, hidden_states) if return_dict else (embeddings,)

    def fold_latent_attention(self) -> "NVEmbedModel":
        """Replaces the latent attention by its folded form, in place; see `FoldedLatentAttention`.

        The folded model can be saved and loaded. Folding cannot be undone: keep the unfolded checkpoint for training.

        Raises:
            ValueError: the pooling is not a latent attention, or it is in training mode, quantized, spread over devices
                or offloaded.
        """
        block = self.latent_attention_model
        if isinstance(block, FoldedLatentAttention):
            return self
        if not isinstance(block, LatentAttention):
            raise ValueError(
                f"the pooling is a {type(block).__name__} (pooling_type {self.config.pooling_type!r}), not a latent "
                "attention; merge an adapter before folding"
            )
        if self.training or block.training:
            raise ValueError("the model is in training mode, and folded latents cannot be trained; call model.eval()")
        if block.latents.is_meta or hasattr(block, "_hf_hook"):
            raise ValueError(
                "the model is spread over devices or offloaded; fold it on one device, save it, and load that"
            )
        for name, parameter in block.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(f"latent_attention_model.{name} is quantized to {parameter.dtype}; fold before that")
        self.latent_attention_model = FoldedLatentAttention.fold(block, self.config.latent_attention_config)
        self.config.latent_attention_is_folded = True
        return self

    @torch.no_grad()
    def encode(
        self,
        prompts: Iterable[str],
        instruction: str = "",
        max_length: int = 4096,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        convert_to_numpy: bool = False,
        show_progress_bar: bool = False,
        return_numpy: bool = False,
        num_workers: int | None = None,
    ):
        """Embeds texts, in evaluation mode and without gradients.

        Texts of similar length share a batch, concatenated without padding. With an accelerator, a thread tokenizes
        ahead. If a batch does not fit into memory, `batch_tokens` is halved and encoding continues.

        Args:
            prompts: the texts, without instruction: a list, a generator, a column of a dataset.
            instruction: prefix of every text, formatted as by `format_instruction`; left out of the pooling.
            max_length: truncate texts to this many tokens, instruction and special tokens included. The decoder's
                `max_position_embeddings` is a limit in any case; exceeding it warns once.
            batch_tokens: tokens per batch. None: 2,048 on a CPU, so that a batch fits its caches, 16,384 elsewhere.
            batch_size: at most this many texts per batch; None: no limit but `batch_tokens`.
            normalize: whether to L2-normalize the embeddings; None: the config's `output_normalize`.
            truncate_dim: keep this many leading dimensions, before normalizing.
            convert_to_numpy: return a NumPy array; the embeddings are then collected in host memory.
            show_progress_bar: whether to show a progress bar.
            return_numpy: the released name of `convert_to_numpy`.
            num_workers: accepted for compatibility with the released code and ignored: tokenizing runs in Rust.

        Returns:
            fp32 `[len(prompts), hidden or truncate_dim]` in the order of the prompts, on the model's device.

        Raises:
            TypeError: `prompts` is a single string, or contains something other than strings.
            ValueError: there are no prompts, or one contains a NUL character or half of a surrogate pair; an argument
                is out of range; `max_length` leaves nothing to pool; the model has no tokenizer.
            RuntimeError: the iterable raised; the model's parts are wrapped in `torch.nn.DataParallel`.
        """
        check_not_wrapped(self)
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: load one with `from_pretrained`, or set `model.tokenizer`")
        if not isinstance(instruction, str):
            raise TypeError(f"instruction is {instruction!r}, not a string; leave it out for no instruction")
        check_characters(instruction, "instruction")
        prompts = check_texts(prompts)
        hidden = self.config.hidden_size
        numbers = (("batch_tokens", batch_tokens, None), ("batch_size", batch_size, None))
        for name, value, largest in (*numbers, ("truncate_dim", truncate_dim, hidden)):
            if value is not None:
                check_number(name, value, largest)
        if normalize is None:
            normalize = self.config.latent_attention_config.output_normalize
        convert_to_numpy = convert_to_numpy or return_numpy

        device = self._batch_device()
        budget = batch_tokens or default_batch_tokens(device)
        embeddings = torch.empty(len(prompts), truncate_dim or hidden, device="cpu" if convert_to_numpy else device)
        in_training, done = [module for module in self.modules() if module.training], 0
        self.eval()
        try:
            with tqdm(total=len(prompts), desc="Encoding", unit="text", disable=not show_progress_bar) as progress:
                for window in self._tokenize_ahead(prompts, instruction, max_length):
                    vectors, budget = self._embed(window, budget, batch_size, done, progress)
                    vectors = vectors[:, :truncate_dim]
                    embeddings[done : done + len(window)] = F.normalize(vectors, dim=-1) if normalize else vectors
                    done += len(window)
        finally:
            for module in in_training:
                module.training = True
        return embeddings.numpy() if convert_to_numpy else embeddings

    def _do_encode(
        self,
        prompts: Iterable[str],
        batch_size: int = 1,
        instruction: str = "",
        max_length: int = 4096,
        num_workers: int = 32,
        **options,
    ):
        """`encode` with the name and argument order of the released code's second entry point."""
        return self.encode(prompts, instruction, max_length, batch_size=batch_size, **options)

    def _tokenize_ahead(self, prompts: list[str], instruction: str, max_length: int) -> Iterator[list[TokenizedText]]:
        """Tokenizes the prompts in windows, one window ahead of the device."""

        def tokenize_window(window: list[str]) -> list[TokenizedText]:
            return tokenize(self.tokenizer, self.config, window, [instruction] * len(window), max_length)

        windows = (prompts[start : start + WINDOW_TEXTS] for start in range(0, len(prompts), WINDOW_TEXTS))
        if self._batch_device().type == "cpu":  # tokenizing and embedding would compete for the same cores
            yield from map(tokenize_window, windows)
            return
        with ThreadPoolExecutor(max_workers=1) as thread:
            ahead: Future | None = None
            for window in windows:
                tokenized, ahead = ahead, thread.submit(tokenize_window, window)
                if tokenized is not None:
                    yield tokenized.result()
            yield ahead.result()

    def _embed(
        self, tokenized: list[TokenizedText], batch_tokens: int, batch_size: int | None, position: int, progress
    ) -> tuple[Tensor, int]:
        """Unnormalized embeddings `[texts, hidden]`, and the `batch_tokens` that fit; `position`: of the first text."""
        lengths = [len(text.input_ids) for text in tokenized]
        embeddings = torch.empty(len(tokenized), self.config.hidden_size, device=self._batch_device())
        batches = deque(length_sorted_batches(lengths, batch_tokens, batch_size))
        while batches:
            try:
                embeddings[batches[0]] = self._embed_batch([tokenized[i] for i in batches[0]])
                progress.update(len(batches.popleft()))
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(batches[0]) == 1:
                    raise RuntimeError(
                        f"prompts[{position + batches[0][0]}] alone, {lengths[batches[0][0]]} tokens, does not fit "
                        "into memory; lower max_length, or load the model in bfloat16 or quantized"
                    ) from error
            # Outside the `except`, whose traceback would keep the failed batch's tensors alive.
            batch_tokens = sum(lengths[i] for i in batches[0]) // 2
            remaining = [i for batch in batches for i in batch]
            halved = length_sorted_batches([lengths[i] for i in remaining], batch_tokens, batch_size)
            batches = deque([remaining[i] for i in batch] for batch in halved)
            logger.warning(f"Out of memory: batch_tokens is {batch_tokens} from here on.")
            torch.cuda.empty_cache()  # does nothing without CUDA
        return embeddings, batch_tokens

    def _embed_batch(self, tokenized: list[TokenizedText]) -> Tensor:
        features, device = pack(tokenized), self._batch_device()
        for name in ("input_ids", "pool_mask"):
            if device.type == "cuda":
                features[name] = features[name].pin_memory()
            features[name] = features[name].to(device, non_blocking=True)
        lengths = features["lengths"]
        states = self(features["input_ids"], lengths=lengths).last_hidden_state
        return self.latent_attention_model.reduce(states, features["pool_mask"], PackedLayout(lengths)).to(device)

    def _batch_device(self) -> torch.device:
        """The parameters' device or, if the first of them is offloaded, the device that computes."""
        if self.device.type != "meta":
            return self.device
        computing = [device for device in self.hf_device_map.values() if device not in ("cpu", "disk")]
        return torch.device(computing[0] if computing else "cpu")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, fold_latent_attention: bool = False, **kwargs):
        """Loads weights as `PreTrainedModel.from_pretrained` does, and the tokenizer beside them.

        Given the folder or repository of an adapter, it loads the base and the adapter on top (needs peft).

        Args:
            fold_latent_attention: fold the latent attention after loading; see the method of this name.

        Raises:
            ValueError: the checkpoint is another kind of model, has no tokenizer, or has missing or unknown tensors; or
                it is an adapter and peft is not installed, or an adapter beside a whole model.
        """
        source = str(pretrained_model_name_or_path)
        if kwargs.get("subfolder") and Path(source).is_dir():
            source = str(Path(source, kwargs.pop("subfolder")))
        names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        hub_options = {name: kwargs[name] for name in names if name in kwargs}
        adapter_options = dict(kwargs.pop("adapter_kwargs", None) or {})
        adapter = adapter_options.pop("_adapter_model_path", None)  # AutoModel has already found the base
        base_options = hub_options
        if adapter is not None:
            find_base_of_adapter(str(adapter), **(hub_options | adapter_options))  # refuses a whole model beside it
        if (base := find_base_of_adapter(source, **hub_options)) is not None:
            if not is_peft_available():
                raise ValueError(f"{source} is an adapter of {base}; loading it needs peft: pip install peft")
            adapter, source = source, base
            # Revision and subfolder are the adapter's; about its base it only says where that is.
            own = {name: kwargs.pop(name) for name in ("revision", "subfolder") if name in kwargs}
            base_options = {name: value for name, value in hub_options.items() if name not in own}
            adapter_options |= own
        try:
            saved, _ = NVEmbedConfig.get_config_dict(source, **base_options)
        except OSError as error:
            if adapter is None:
                if source.count("/") > 1 and not Path(source).exists():
                    raise OSError(f"{source} does not exist; name a folder, or a Hub model as owner/name") from error
                raise
            raise ValueError(
                f"{source}, the base of the adapter {adapter}, is neither a folder here nor a Hub model that can be "
                f"reached; write where it lies into base_model_name_or_path of adapter_config.json ({error})"
            ) from error
        if saved.get("model_type") != NVEmbedConfig.model_type:
            kind = f"is a {saved['model_type']!r} model" if "model_type" in saved else "has no config.json of a model"
            of_adapter = f" (the base of the adapter {adapter})" if adapter else ""
            raise ValueError(
                f"{source}{of_adapter} {kind}, not an NV-Embed checkpoint; "
                "train/init_checkpoint.py --base makes one from a decoder"
            )
        tokenizer = load_tokenizer(
            source, saved.get("add_pad_token", True), saved.get("text_config", {}).get("vocab_size"), **base_options
        )
        with_info = kwargs.pop("output_loading_info", False)
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs["quantization_config"] = _spare_the_pooling(kwargs.get("quantization_config"))
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that errors name the tensor
        try:
            model, info = super().from_pretrained(source, *args, **kwargs)
        except Exception as error:
            if (damaged := find_damaged_file(adapter or source) or find_damaged_file(source)) is None:
                raise
            raise ValueError(f"{damaged} is cut off or damaged ({error}); download it again") from error
        misshapen = () if may_differ else info["mismatched_keys"]
        check_tensors(source, info["missing_keys"], info["unexpected_keys"], misshapen)
        if type(getattr(model, "hf_quantizer", None)).__name__ == "TorchAoHfQuantizer":
            # What transformers 5 does to stored tensors when it loads them need not, and cannot, be reverted to save.
            model._weight_conversions = []
        if adapter is not None:
            load_adapter(model, adapter, **(hub_options | adapter_options))
        model.tokenizer = tokenizer
        if fold_latent_attention:
            model.fold_latent_attention()
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Writes a folder that loads anywhere: weights, config, the three code files, the tokenizer and the files of
        sentence-transformers."""
        if kwargs.get("is_main_process", True):
            unlink_hard_links(save_directory)
            save_tokenizer(self.tokenizer, save_directory)
            save_sentence_transformers_files(self.config, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _get_files_timestamps(self, working_dir) -> dict[str, float]:
        """Timestamps by which `push_to_hub=True` finds unchanged files, without those that `save_pretrained` wrote."""
        stamps = super()._get_files_timestamps(working_dir)
        ours = ("tokenizer", "special_tokens_map.json", "modules.json", "config_sentence_transformers.json")
        return {name: stamp for name, stamp in stamps.items() if not name.startswith(ours)}


def check_not_wrapped(model: nn.Module) -> None:
    """Raises if the model's parts are wrapped in `DataParallel`, as the multi-GPU lines of the released cards do."""
    for name, module in model.named_children():
        if isinstance(module, nn.DataParallel):
            raise RuntimeError(
                f"{name} is wrapped in torch.nn.DataParallel, which cannot split packed texts. For several GPUs: "
                'SentenceTransformer(checkpoint, trust_remote_code=True).encode(texts, device=["cuda:0", "cuda:1"]), '
                "or, for a corpus, nvembed's eval/embed_corpus.py with one task a GPU"
            )


def default_batch_tokens(device: torch.device) -> int:
    return 2048 if device.type == "cpu" else 16384  # on a CPU, so that a batch fits its caches


def is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _spare_the_pooling(quantization_config):
    """Excludes the latent attention's linear layers from quantization by bitsandbytes."""
    spared, field = "latent_attention_model", "llm_int8_skip_modules"
    if isinstance(quantization_config, dict) and {"load_in_8bit", "load_in_4bit"} & quantization_config.keys():
        return quantization_config | {field: [*(quantization_config.get(field) or ()), spared]}
    if hasattr(quantization_config, field):
        quantization_config = copy(quantization_config)  # the caller's stays as it was
        setattr(quantization_config, field, [*(getattr(quantization_config, field) or ()), spared])
    return quantization_config


# --- Files -----------------------------------------------------------------------------------------------------------


def check_tensors(name: str, missing: Iterable[str], unknown: Iterable[str], misshapen: Iterable[tuple]) -> None:
    """Raises where transformers would only warn and initialize weights at random.

    Args:
        misshapen: (name, shape found, shape expected) of each tensor with a wrong shape.

    Raises:
        ValueError: any of the three is not empty; the error names the first tensor.
    """
    advice = "is the download whole, and does config.json belong to these weights?"
    for problem, keys in (("lacks", missing), ("has unknown", unknown)):
        if keys:
            raise ValueError(f"{name} {problem} tensors: {len(keys)}, the first is {min(keys)}; {advice}")
    if misshapen:
        key, found, expected = min(misshapen)
        raise ValueError(f"{name}: {key} is {list(found)} in the file and {list(expected)} by config.json; {advice}")


def find_damaged_file(folder: str) -> Path | None:
    """The first safetensors file of a local folder whose size contradicts its header."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                tensors = json.loads(file.read(min(length, path.stat().st_size)))
                ends = [entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"]
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                return path
        if path.stat().st_size != 8 + length + max(ends, default=0):
            return path
    return None


def unlink_hard_links(folder: str) -> None:
    """Removes hard-linked weight files from a folder about to be overwritten.

    safetensors before 0.8 writes into an existing file. In a folder made by `train/init_checkpoint.py --from_released`
    that would be the released file itself. Tensors already loaded from it stay readable.
    """
    for path in Path(folder).glob("*.safetensors"):
        if path.stat().st_nlink > 1:
            path.unlink()


def find_base_of_adapter(name_or_path: str, **hub_options) -> str | None:
    """The base that an adapter's folder or repository names; None if it holds a whole model, or neither.

    Raises:
        ValueError: it holds both, or `adapter_config.json` is damaged or names no base.
    """
    try:
        file = find_adapter_config_file(name_or_path, **hub_options)
    except OSError:  # no such repository: loading its config gives the better error
        return None
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if file is None:
        return None
    if cached_file(name_or_path, "config.json", **quiet, **hub_options) is not None:
        # The adapter may be merged into the model already, and what transformers loads differs by folder and Hub.
        raise ValueError(
            f"{name_or_path} holds a whole model (config.json) beside an adapter (adapter_config.json), so it is "
            "ambiguous which to load; keep only one of the two there"
        )
    try:
        base = json.loads(Path(file).read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or names no base_model_name_or_path ({error!r})") from error
    if not base:
        raise ValueError(f"{file} names no base_model_name_or_path; write the base's folder or Hub name there")
    return base


def load_adapter(model: NVEmbedModel, adapter: str, **hub_options) -> None:
    """Adds an adapter to its base through transformers' peft integration, including modules trained in full.

    Raises:
        ValueError: the adapter has no weights file, tensors are missing or unknown for this base, or the base is
            pruned.
    """
    if model.config.is_sparse:
        raise ValueError(
            f"{adapter} is an adapter of a pruned base, trained to leave its zeros alone, and loading it would fill "
            "them: load the merged checkpoint that the training wrote"
        )
    weights_file = cached_file(
        adapter, "adapter_model.safetensors", _raise_exceptions_for_missing_entries=False, **hub_options
    )
    if weights_file is None:
        raise ValueError(f"{adapter} has no adapter_model.safetensors; is the download whole?")
    weights = load_state_dict(weights_file)
    settings = json.loads(Path(find_adapter_config_file(adapter, **hub_options)).read_text())
    in_full = settings.get("modules_to_save") or []
    names = [name for name, _ in model.named_modules() if any(name.endswith(ending) for ending in in_full)]
    if IS_TRANSFORMERS_5:  # transformers 4 leaves this to peft
        weights = {_name_in_wrapper(key, names): tensor for key, tensor in weights.items()}
    info = model.load_adapter(adapter, adapter_state_dict=weights, adapter_kwargs=hub_options)
    if info is not None:
        check_tensors(adapter, info.missing_keys, info.unexpected_keys, info.mismatched_keys)
    # It was trained in fp32 beside a bf16 decoder; peft casts the inputs of LoRA layers, but not those of this.
    model.latent_attention_model.to(model.embedding_model.embed_tokens.weight.dtype)
    model.eval()


def _name_in_wrapper(key: str, in_full: list[str]) -> str:
    """The name of a weight inside peft's copy of a module trained in full, or inside DoRA's layer."""
    prefix = "base_model.model."
    if key.endswith(".lora_magnitude_vector"):
        return f"{key}.weight"  # transformers inserts the adapter's name
    for name in in_full:
        if key.startswith(f"{prefix}{name}."):
            return f"{prefix}{name}.modules_to_save.default.{key.removeprefix(f'{prefix}{name}.')}"
    return key


def save_sentence_transformers_files(config: NVEmbedConfig, folder: str) -> None:
    """Writes `modules.json` and, with the config's prompts and similarity, `config_sentence_transformers.json`."""
    module = {"idx": 0, "name": "0", "path": "", "type": "modeling_nvembed.NVEmbedTransformer"}
    settings = {name: getattr(config, name) for name in ("prompts", "default_prompt_name", "similarity_fn_name")}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "modules.json").write_text(json.dumps([module], indent=2) + "\n")
    Path(folder, "config_sentence_transformers.json").write_text(json.dumps(settings, indent=2) + "\n")


# --- sentence-transformers -------------------------------------------------------------------------------------------


class NVEmbedTransformer(nn.Module):
    """The only module of a `SentenceTransformer` made from a checkpoint: texts to embeddings, as `NVEmbedModel.encode`.

    sentence-transformers' own `Transformer` and `Pooling` would count a prompt's tokens differently and not append the
    `</s>` that the released code adds to the text. `prompt` is the instruction. The class follows their interface
    (`preprocess`, or `tokenize` before 5.4) without importing them.
    """

    save_in_root = True
    modalities = ["text"]

    def __init__(self, model: NVEmbedModel):
        super().__init__()
        self.auto_model = model

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.auto_model.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.auto_model.tokenizer = tokenizer

    @property
    def processor(self) -> PreTrainedTokenizerFast:
        return self.auto_model.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text with its prompt; stored in the config, so that it is saved."""
        config = self.auto_model.config
        positions = config.text_config.max_position_embeddings
        return min(config.max_seq_length or positions, positions)

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        self.auto_model.config.max_seq_length = tokens

    def get_embedding_dimension(self) -> int:
        return self.auto_model.config.hidden_size

    get_sentence_embedding_dimension = get_embedding_dimension  # its name before 5.4

    def preprocess(self, inputs: list[str], prompt: str | None = None, **options) -> dict[str, Tensor]:
        """Tokenizes texts into padded tensors `[texts, longest]`; `pool_mask` leaves out the prompt's tokens."""
        # Not a TypeError: on one, sentence-transformers tries again with the prompt prepended to the texts. The error
        # gives no position, because the texts come sorted.
        for text in (prompt or "", *inputs):
            if not isinstance(text, str):
                raise ValueError(f"a text is {text!r} of type {type(text).__name__}, not a string")
            check_characters(text, f"the text or prompt {text[:40]!r}")
        model, prompts = self.auto_model, [prompt or ""] * len(inputs)
        rows = tokenize(
            model.tokenizer, model.config, inputs, prompts, options.get("max_length") or self.max_seq_length
        )
        return pad(rows, model.tokenizer.pad_token_id)

    def tokenize(self, texts: list[str], **options) -> dict[str, Tensor]:
        """Tokenizes texts that already include their prompt, whose length `forward` gets in the features."""
        return self.preprocess(texts)

    def forward(self, features: dict[str, Tensor], **options) -> dict[str, Tensor]:
        mask, pool_mask = features["attention_mask"], features["pool_mask"]
        if features.get("prompt_length") is not None and self.auto_model.config.is_mask_instruction:
            # Before 5.4 `prompt_length` includes `<s>`; `encode` leaves out as many tokens as the prompt has.
            length = torch.as_tensor(features["prompt_length"], device=pool_mask.device).flatten()[0] - 1
            pool_mask = pool_mask * (torch.arange(pool_mask.shape[1], device=pool_mask.device) >= length)
        if getattr(getattr(self.auto_model, "active_peft_config", None), "is_prompt_learning", False):
            output = self.auto_model(features["input_ids"], mask, pool_mask=pool_mask)  # which adds tokens
            embeddings, states = output.sentence_embeddings, output.last_hidden_state
        else:
            embeddings, states = self._forward_packed(features["input_ids"], mask.bool(), pool_mask)
        return features | {"sentence_embedding": embeddings, "token_embeddings": states}

    def _forward_packed(self, input_ids: Tensor, mask: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
        """As on the padded rows, `[texts, tokens]`, without spending work on padding, whose states are zero."""
        lengths = mask.sum(1).tolist()
        budget = sum(lengths) if torch.is_grad_enabled() else default_batch_tokens(input_ids.device)
        outputs, rows, columns = [], [], []
        for texts in length_sorted_batches(lengths, budget, None):
            batch_lengths, texts = [lengths[i] for i in texts], torch.tensor(texts, device=mask.device)
            row, column = mask[texts].nonzero(as_tuple=True)
            row = texts[row]
            output = self.auto_model(input_ids[row, column], pool_mask=pool_mask[row, column], lengths=batch_lengths)
            outputs.append((texts, output.sentence_embeddings, output.last_hidden_state))
            rows.append(row)
            columns.append(column)
        order, embeddings, states = map(torch.cat, zip(*outputs))
        padded = states.new_zeros(*mask.shape, states.shape[-1])
        padded = padded.index_put((torch.cat(rows), torch.cat(columns)), states)
        return torch.empty_like(embeddings).index_copy(0, order, embeddings), padded

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict | None = None,
        config_kwargs: dict | None = None,
        processor_kwargs: dict | None = None,
        tokenizer_kwargs: dict | None = None,
        backend: str = "torch",
        **kwargs,
    ) -> "NVEmbedTransformer":
        """Called by `SentenceTransformer(model_name_or_path, model_kwargs=...)`; `model_kwargs` and `config_kwargs`
        go to `NVEmbedModel.from_pretrained`.

        Args:
            processor_kwargs: only `model_max_length`, which becomes `max_seq_length`; called `tokenizer_kwargs` before
                sentence-transformers 5.4.

        Raises:
            ValueError: `backend` is not torch, or another tokenizer setting is given.
        """
        if backend != "torch":
            raise ValueError(f"backend is {backend!r}; NV-Embed checkpoints only run in torch: leave `backend` out")
        settings = dict(processor_kwargs or tokenizer_kwargs or {})
        max_seq_length = settings.pop("model_max_length", None)
        if settings:
            raise ValueError(
                f"processor_kwargs has {', '.join(settings)}; the checkpoint's tokenizer is read as it is, only "
                "model_max_length can be set"
            )
        hub_options = {"token": token, "cache_dir": cache_folder, "local_files_only": local_files_only}
        options = hub_options | {"revision": revision} | (config_kwargs or {}) | (model_kwargs or {})
        if subfolder:  # within a Router
            options["subfolder"] = subfolder
        module = cls(NVEmbedModel.from_pretrained(model_name_or_path, **options))
        if max_seq_length is not None:
            check_number("model_max_length", max_seq_length)
            module.max_seq_length = max_seq_length
        return module

    def save(self, output_path: str, *args, **kwargs) -> None:
        # sentence-transformers has already written its own config with the user's prompts. In a Router, this module is
        # in a subfolder, and its class is looked up in the Router's folder.
        folder, config = Path(output_path).resolve(), self.auto_model.config
        for root in (folder, *folder.parents[:2]):
            file = root / "config_sentence_transformers.json"
            if file.is_file():
                settings = json.loads(file.read_text())
                config.prompts = settings["prompts"]
                config.default_prompt_name = settings.get("default_prompt_name")
                config.similarity_fn_name = settings.get("similarity_fn_name") or "cosine"
                if root != folder:
                    custom_object_save(self.auto_model, str(root))
                break
        unlink_hard_links(output_path)
        save_tokenizer(self.tokenizer, output_path)
        PreTrainedModel.save_pretrained(self.auto_model, output_path)

    def __reduce_ex__(self, protocol):
        if type(self) is not NVEmbedTransformer:
            return super().__reduce_ex__(protocol)
        return _restore_module, (self.__dict__,)  # not by `__module__`, which cannot be imported


def _restore_module(state: dict) -> NVEmbedTransformer:
    module = NVEmbedTransformer.__new__(NVEmbedTransformer)
    module.__setstate__(state)
    return module


# sentence-transformers writes `__module__` and the class name into `modules.json` and a Router's types. They must name
# the file in the checkpoint, or the folder would load only where nvembed is installed.
NVEmbedTransformer.__module__ = "modeling_nvembed"

NVEmbedModel.register_for_auto_class()
