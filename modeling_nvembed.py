"""NV-Embed: a bidirectional Mistral decoder, a latent attention over its token states, and one embedding per text.

Source: Lee et al., "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models",
arXiv 2405.17428. Modules carry the names of the released weights. The file follows a text on its way:
attention, decoder layer, decoder, pooling, model, `encode`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.logging import tqdm

from .configuration_nvembed import BidirectionalMistralConfig, LatentAttentionConfig, NVEmbedConfig


# --- Decoder ---------------------------------------------------------------------------------------------------------


def inverse_frequencies(config: BidirectionalMistralConfig, device: torch.device) -> tuple[Tensor, float]:
    """RoPE's inverse frequencies, fp32 `[head_dim / 2]`, and the factor on cos and sin.

    They are computed on every forward instead of being kept in a buffer: a buffer is lost when a model is loaded
    through the meta device and rounded when it is cast to bf16, and 64 powers cost nothing.

    Raises:
        ValueError: a rope type whose frequencies depend on the length of the text.
    """
    # transformers 5 keeps theta and scaling in `rope_parameters`, transformers 4 in two fields.
    rope = getattr(config, "rope_parameters", None) or {
        "rope_theta": config.rope_theta,
        **(getattr(config, "rope_scaling", None) or {}),
    }
    rope_type = rope.get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(f"rope_type {rope_type!r} depends on the text's length; default, linear, llama3, yarn work")
    if rope_type != "default":
        return ROPE_INIT_FUNCTIONS[rope_type](config, device)
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    return rope["rope_theta"] ** -exponents, 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `[batch, heads, tokens, head_dim]` by angles given as `[tokens, head_dim]`; halves are paired."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MistralRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # as Mistral does: statistics in fp32, the weight applied in the input's dtype
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MistralAttention(nn.Module):
    """Grouped-query attention with rotary positions; the mask decides whether it is bidirectional."""

    def __init__(self, config: BidirectionalMistralConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.groups = heads // kv_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        head_shape = (*x.shape[:-1], -1, self.head_dim)  # [batch, tokens, heads, head_dim]
        q = rotate(self.q_proj(x).view(head_shape).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(head_shape).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(head_shape).transpose(1, 2)
        if self.groups > 1:  # not `enable_gqa`: with a mask it has no fused kernel on CUDA
            k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, is_causal)
        return x + self.mlp(self.post_attention_layernorm(x))


class BidirectionalMistralModel(nn.Module):
    """Mistral's layers without (`mask_type="b"`) or with (`"c"`) the causal mask; padding is always masked."""

    def __init__(self, config: BidirectionalMistralConfig, mask_type: str):
        super().__init__()
        self.config = config
        self.mask_type = mask_type
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MistralDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids and their mask, both `[batch, tokens]`, to states `[batch, tokens, hidden]`.

        Without `attention_mask` every position is a token, which spares the attention its mask.
        """
        x = self.embed_tokens(input_ids)
        frequencies, scaling = inverse_frequencies(self.config, x.device)
        angles = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)  # [tokens, head_dim]
        cos, sin = ((scaling * f(angles)).to(x.dtype) for f in (torch.cos, torch.sin))

        is_causal, mask = self.mask_type == "c", None
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]
            if is_causal:
                tokens = x.shape[1]
                mask = mask & torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
                is_causal = False  # the mask says it now
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, mask, is_causal, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, is_causal)
        return self.norm(x)


# --- Pooling: token states -> token states -> one vector a text ------------------------------------------------------


class MeanPooling(nn.Module):
    """The mean of the token states; also the frame of the others, which override one of its two steps."""

    def __init__(self, config: LatentAttentionConfig):
        super().__init__()
        self.output_normalize = config.output_normalize

    def forward(self, states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """States `[batch, tokens, hidden]` to states of the same shape."""
        return states

    def pool(self, states: Tensor, pool_mask: Tensor) -> Tensor:
        """States `[batch, tokens, hidden]` and the mask of those that count to fp32 embeddings `[batch, hidden]`."""
        embeddings = self.reduce(states, pool_mask)
        return F.normalize(embeddings, dim=-1) if self.output_normalize else embeddings

    def reduce(self, states: Tensor, pool_mask: Tensor) -> Tensor:
        weights = pool_mask.unsqueeze(-1).float()
        return (states * weights).sum(1) / weights.sum(1)


class EosPooling(MeanPooling):
    """The state of the last token, `</s>` (a text that `max_length` cut may end on another)."""

    def reduce(self, states: Tensor, pool_mask: Tensor) -> Tensor:
        positions = torch.arange(pool_mask.shape[1], device=pool_mask.device)
        last = (pool_mask * positions).argmax(1)
        return states[torch.arange(len(states), device=states.device), last].float()


class ResidualOutput(nn.Linear):
    """The last linear map of a residual block; a new one is zero, so that the block adds nothing until trained."""


class Attention(nn.Module):
    """Multi-head attention from `x` to `context`; the width of a head is free of the width of the states."""

    def __init__(self, config: LatentAttentionConfig, context_dim: int):
        super().__init__()
        self.head_dim = config.cross_dim_head
        inner = config.num_cross_heads * config.cross_dim_head
        self.to_q = nn.Linear(config.hidden_dim, inner, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * inner, bias=False)
        self.to_out = ResidualOutput(inner, config.hidden_dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x` `[batch, tokens, hidden]`, `context` `[batch, keys, width]`, mask over the keys `[batch, keys]`."""
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.bool()[:, None, None, :])
        return self.to_out(out.transpose(1, 2).flatten(-2))


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
    """`fn` behind a LayerNorm, with a second one for its context where it has one."""

    def __init__(self, dim: int, fn: nn.Module, context_dim: int | None = None):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim) if context_dim is not None else None


class LatentAttention(MeanPooling):
    """Token states attend to r trainable latents, then an MLP, then the mean (paper section 3.2, equations 1-2)."""

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

    def forward(self, states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        attend, feed = self.cross_attend_blocks
        context = attend.norm_context(self.latents).unsqueeze(0)
        # Every token of every text meets the same latents: the batch is one long row, its keys are computed once.
        x = states.flatten(0, 1).unsqueeze(0)
        x = x + attend.fn(attend.norm(x), context)
        x = x + feed.fn(feed.norm(x))
        return x.view_as(states)


class SelfAttention(MeanPooling):
    """A self-attention layer and an MLP, then the mean: the paper's ablation of the latents (section 3.2, table 3)."""

    def __init__(self, config: LatentAttentionConfig):
        super().__init__(config)
        dim = config.hidden_dim
        self.self_attend_blocks = nn.ModuleList([PreNorm(dim, Attention(config, dim)), PreNorm(dim, FeedForward(dim))])

    def forward(self, states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        attend, feed = self.self_attend_blocks
        normed = attend.norm(states)
        states = states + attend.fn(normed, normed, attention_mask)
        return states + feed.fn(feed.norm(states))


POOLINGS = {
    "latent_attention": LatentAttention,
    "mean": MeanPooling,
    "eos": EosPooling,
    "self_attention": SelfAttention,
}


# --- Text -> tensors: shared by `encode` and by the training collator -----------------------------------------------


def format_instruction(task: str) -> str:
    """A task definition as the prefix of a query (paper section 3.1); no task, no prefix."""
    return f"Instruct: {task}\nQuery: " if task else ""


@dataclass
class TokenizedText:
    """Token ids of instruction + text, of which the first `instruction_length` are left out of the pooling."""

    input_ids: list[int]
    instruction_length: int


def tokenize(
    tokenizer: PreTrainedTokenizerFast,
    config: NVEmbedConfig,
    texts: list[str],
    instructions: list[str],
    max_length: int,
) -> list[TokenizedText]:
    """Tokenizes `instructions[i] + texts[i]`, cut to `max_length` tokens.

    The instruction's length is that of the released code: its tokens alone, without `<s>`. `<s>` makes up for the
    last of them, the space behind "Query:", which joins the first word of the text.

    Raises:
        ValueError: `max_length` is no positive integer, or an instruction fills it and leaves no text to pool.
    """
    if not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length is {max_length!r}; it must be a number of tokens, 1 or more")
    end = tokenizer.eos_token if config.add_eos else ""
    full = [instruction + text + end for instruction, text in zip(instructions, texts, strict=True)]
    rows = tokenizer(full, max_length=max_length, truncation=True)["input_ids"]
    lengths = {"": 0}
    if config.is_mask_instruction:
        lengths |= {prefix: len(tokenizer.tokenize(prefix)) for prefix in set(instructions) if prefix}
    for row, prefix, text, whole in zip(rows, instructions, texts, full):
        left = len(row) - lengths.get(prefix, 0)
        # Of a cut row a few tokens may be left and still none of the text: the prefix's last space, `</s>`.
        is_cut = prefix and text and len(row) == max_length and left <= 3
        if left < 1 or (is_cut and not _holds_text(tokenizer, whole, len(prefix), max_length)):
            raise ValueError(
                f"the instruction {prefix!r} is {lengths[prefix]} tokens long and max_length is {max_length}: "
                "no token of the text is left to pool; raise max_length or shorten the instruction"
            )
    return [TokenizedText(row, lengths.get(prefix, 0)) for row, prefix in zip(rows, instructions)]


def _holds_text(tokenizer: PreTrainedTokenizerFast, whole: str, prefix_length: int, max_length: int) -> bool:
    spans = tokenizer(whole, max_length=max_length, truncation=True, return_offsets_mapping=True)["offset_mapping"]
    return any(end > prefix_length for _, end in spans)


def pad(texts: list[TokenizedText], pad_token_id: int) -> dict[str, Tensor]:
    """Pads on the right: `input_ids`, `attention_mask` and `pool_mask`, each `[texts, longest]`."""
    lengths = torch.tensor([len(text.input_ids) for text in texts])
    instruction_lengths = torch.tensor([text.instruction_length for text in texts])
    longest = int(lengths.max())
    input_ids = torch.tensor([text.input_ids + [pad_token_id] * (longest - len(text.input_ids)) for text in texts])
    positions = torch.arange(longest)
    attention_mask = positions < lengths[:, None]
    pool_mask = attention_mask & (positions >= instruction_lengths[:, None])
    return {"input_ids": input_ids, "attention_mask": attention_mask.long(), "pool_mask": pool_mask.long()}


def length_sorted_batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each of at most `batch_tokens` tokens with its padding.

    A text longer than `batch_tokens` makes a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


# --- Model -----------------------------------------------------------------------------------------------------------


@dataclass
class NVEmbedModelOutput(ModelOutput):
    """
    Args:
        sentence_embeddings: fp32 `[batch, hidden]`; without a pool mask the token states, as in the released code.
        last_hidden_state: token states `[batch, tokens, hidden]` behind the latent attention, given without a pool
            mask only.
    """

    sentence_embeddings: Tensor | None = None
    last_hidden_state: Tensor | None = None


class NVEmbedModel(PreTrainedModel):
    """The embedding model: `encode` for texts, `forward` for tensors.

    A new model starts as its decoder's mean pooling: both residual blocks of the latent (or self-) attention end in
    a `ResidualOutput`, which is zero at first, so the embedding is exactly the mean of the decoder's states.
    """

    config_class = NVEmbedConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MistralDecoderLayer", "LatentAttention", "SelfAttention"]

    def __init__(self, config: NVEmbedConfig):
        super().__init__(config)
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.embedding_model = BidirectionalMistralModel(config.text_config, config.mask_type)
        # The released name, whatever the pooling, so that `train/` finds what it trains in full under one name.
        self.latent_attention_model = POOLINGS[config.pooling_type](config.latent_attention_config)
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
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pool_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> NVEmbedModelOutput | tuple[Tensor]:
        """Token ids `[batch, tokens]` to embeddings, or to token states.

        Args:
            attention_mask: 1 for a token, 0 for padding, `[batch, tokens]`; None: no padding.
            pool_mask: 1 for a token that counts in the pooling, `[batch, tokens]`; None: no pooling.
            return_dict: False for a tuple of one tensor.
        """
        states = self.embedding_model(input_ids, attention_mask)
        states = self.latent_attention_model(states, attention_mask)
        if pool_mask is None:
            return NVEmbedModelOutput(states, states) if return_dict else (states,)
        embeddings = self.latent_attention_model.pool(states, pool_mask)
        return NVEmbedModelOutput(embeddings) if return_dict else (embeddings,)

    @torch.no_grad()
    def encode(
        self,
        prompts: Iterable[str],
        instruction: str = "",
        max_length: int = 4096,
        batch_tokens: int | None = None,
        show_progress_bar: bool = False,
    ) -> Tensor:
        """Embeds texts, in evaluation mode and without gradients.

        Args:
            prompts: the texts, without instruction.
            instruction: prefix of every text, as `format_instruction` writes it; left out of the pooling.
            max_length: tokens of a text with its instruction and special tokens; the rest is cut off.
            batch_tokens: tokens of a batch, padding included; texts of similar length share one. None: 2,048 on a
                CPU, where a batch should fit its caches, 16,384 elsewhere.

        Returns:
            fp32 `[len(prompts), hidden]` on the model's device, in the order of the prompts, L2-normalized unless
            the config's `output_normalize` is off.

        Raises:
            TypeError: `prompts` is a single string, or holds something else than strings.
            ValueError: no prompts; `max_length` leaves nothing to pool; the model has no tokenizer.
        """
        prompts = self._check_prompts(prompts, instruction)
        texts = tokenize(self.tokenizer, self.config, prompts, [instruction] * len(prompts), max_length)
        batch_tokens = batch_tokens or (2048 if self.device.type == "cpu" else 16384)
        batches = list(length_sorted_batches([len(text.input_ids) for text in texts], batch_tokens))
        embeddings = torch.empty(len(texts), self.config.hidden_size, device=self.device)
        was_training = self.training
        self.eval()
        try:
            with tqdm(total=len(texts), desc="Encoding", unit="text", disable=not show_progress_bar) as progress:
                for batch in batches:
                    features = pad([texts[i] for i in batch], self.tokenizer.pad_token_id)
                    if features["attention_mask"].all():
                        features["attention_mask"] = None
                    features = {name: x if x is None else x.to(self.device) for name, x in features.items()}
                    embeddings[batch] = self(**features).sentence_embeddings
                    progress.update(len(batch))
        finally:
            self.train(was_training)
        return embeddings

    def _check_prompts(self, prompts: Iterable[str], instruction: str) -> list[str]:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: load one with `from_pretrained`, or set `model.tokenizer`")
        if isinstance(prompts, str):
            raise TypeError(f"prompts is the string {prompts[:40]!r}; encode takes a list: encode([text])")
        if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, dict)):
            raise TypeError(f"prompts is of type {type(prompts).__name__}; encode takes a list of strings")
        if not isinstance(instruction, str):
            raise TypeError(f"instruction is {instruction!r}, not a string; leave it out for no instruction")
        prompts = list(prompts)
        if len(prompts) == 0:
            raise ValueError("prompts is an empty list; encode needs at least one text")
        for position, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompts[{position}] is {prompt!r} of type {type(prompt).__name__}, not a string")
        return prompts

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads weights as `PreTrainedModel.from_pretrained` does, and the tokenizer that lies beside them.

        Raises:
            ValueError: the checkpoint is another kind of model, or has no tokenizer.
        """
        names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        hub_options = {name: kwargs[name] for name in names if name in kwargs}
        saved, _ = NVEmbedConfig.get_config_dict(pretrained_model_name_or_path, **hub_options)
        if saved.get("model_type") != NVEmbedConfig.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a {saved.get('model_type')!r} model, not an NV-Embed checkpoint; "
                "train/init_checkpoint.py --base makes one from a decoder"
            )
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info=True`
        model.tokenizer = load_tokenizer(pretrained_model_name_or_path, model.config, **hub_options)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Writes safetensors, `config.json`, the two code files, and the tokenizer: a folder that loads anywhere."""
        if self.tokenizer is not None and kwargs.get("is_main_process", True):
            self.tokenizer.save_pretrained(save_directory)  # first: `push_to_hub=True` uploads what is there
        super().save_pretrained(save_directory, *args, **kwargs)


def load_tokenizer(name_or_path: str, config: NVEmbedConfig, **hub_options) -> PreTrainedTokenizerFast:
    """The checkpoint's own `tokenizer.json`, as it is.

    Not through `AutoTokenizer`: the class that the released checkpoints name, `LlamaTokenizer`, rebuilds its
    normalizer in transformers 5 and tokenizes differently.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(name_or_path, padding_side=config.padding_side, **hub_options)
    if tokenizer.pad_token is None and config.add_pad_token:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


NVEmbedModel.register_for_auto_class()
