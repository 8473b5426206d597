"""What an NV-Embed checkpoint says about itself.

The field names are those of the released `nvidia/NV-Embed-v1` and `-v2` checkpoints, so that their `config.json`
loads unchanged; `pooling_type`, `latent_attention_is_folded`, `prompts`, `default_prompt_name`, `similarity_fn_name`
and `max_seq_length` are added.
"""

from transformers import MistralConfig, PretrainedConfig


POOLING_TYPES = ("latent_attention", "mean", "eos", "self_attention")
MASK_TYPES = ("b", "c")


class LatentAttentionConfig(PretrainedConfig):
    """Shape of the block between the decoder and the pooling (paper section 3.2).

    Args:
        num_latents_value: number of trainable latents, r in the paper.
        num_cross_heads: attention heads.
        output_normalize: L2-normalize the embeddings.
        hidden_dim: width of the token states, the decoder's hidden size.
        latent_dim: width of a latent.
        cross_dim_head: width of one attention head; the released checkpoints use the full hidden size per head.
        projection_dim: width of the embeddings if another than the decoder's, by a linear map behind the pooling's
            other layers: the space of another model, which `train/distill.py` trains a student into. None: no map.
        subtract_mean: subtract a constant of the checkpoint from each text's embedding before it is normalized: the
            mean embedding of `train/center.py`.
    """

    model_type = "latent_attention"

    def __init__(
        self,
        num_latents_value: int = 512,
        num_cross_heads: int = 8,
        output_normalize: bool = True,
        hidden_dim: int = 4096,
        latent_dim: int = 4096,
        cross_dim_head: int = 4096,
        projection_dim: int | None = None,
        subtract_mean: bool = False,
        **kwargs,
    ):
        self.num_latents_value = num_latents_value
        self.num_cross_heads = num_cross_heads
        self.output_normalize = output_normalize
        self.hidden_dim = hidden_dim
        self.latent_dim = latent_dim
        self.cross_dim_head = cross_dim_head
        self.projection_dim = projection_dim
        self.subtract_mean = subtract_mean
        super().__init__(**kwargs)


class BidirectionalMistralConfig(MistralConfig):
    """A Mistral decoder read without its causal mask; `sliding_window` has no effect, as in the released code.

    Args:
        qkv_bias: whether the query, key and value projections have a bias, as Qwen2's.
        qk_norm: whether each head's queries and keys pass an RMS norm before the rotation, as Qwen3's.
    """

    model_type = "bidir_mistral"

    def __init__(self, *args, qkv_bias: bool = False, qk_norm: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        if getattr(self, "head_dim", None) is None:  # as transformers 4.57 leaves it
            self.head_dim = self.hidden_size // self.num_attention_heads


class NVEmbedConfig(PretrainedConfig):
    """Configuration of an `NVEmbedModel`.

    Args:
        text_config: the decoder, a `BidirectionalMistralConfig` or its fields as a dictionary.
        latent_attention_config: a `LatentAttentionConfig` or its fields as a dictionary.
        pooling_type: how token states become one embedding. `latent_attention`: attention over the latents, then the
            mean (the paper's); `mean`; `eos`: the last token's state; `self_attention`: a self-attention layer of the
            latent attention's heads, then the mean (the paper's ablations, section 3.2).
        mask_type: `b` for bidirectional attention, `c` for causal attention.
        padding_side: `right`, the only side on which the instruction starts every row.
        add_pad_token: pad with `</s>` when the tokenizer has no pad token.
        is_mask_instruction: leave the instruction's tokens out of the pooling.
        add_eos: `encode` appends the end token to every text. False where the tokenizer already does, as in
            the checkpoints that `train/init_checkpoint.py --base` makes.
        latent_attention_is_folded: the weights are those of `NVEmbedModel.fold_latent_attention`.
        prompts: instructions by the name of their task, for `SentenceTransformer.encode(..., prompt_name=...)`.
        default_prompt_name: of those, the one that sentence-transformers takes where none is asked for; None: none.
        similarity_fn_name: that sentence-transformers compares by: cosine, dot, euclidean or manhattan.
        pruning: what `train/compress/prune.py` made of the decoder: `method`, `pattern` ("unstructured", or "N:M", N
            of M neighbours being kept) and `sparsity`; zeros stay zero in training. None: not pruned.
        max_seq_length: tokens of a text under sentence-transformers; None: the decoder's `max_position_embeddings`,
            which is the most in any case, and which the top of config.json repeats: text-embeddings-inference reads
            both there.

    Raises:
        ValueError: `pooling_type`, `mask_type` or `padding_side` is not one of the above; folded without latents.
    """

    model_type = "nvembed"
    sub_configs = {"text_config": BidirectionalMistralConfig, "latent_attention_config": LatentAttentionConfig}

    def __init__(
        self,
        text_config: BidirectionalMistralConfig | dict | None = None,
        latent_attention_config: LatentAttentionConfig | dict | None = None,
        pooling_type: str = "latent_attention",
        mask_type: str = "b",
        padding_side: str = "right",
        add_pad_token: bool = True,
        is_mask_instruction: bool = True,
        add_eos: bool = True,
        latent_attention_is_folded: bool = False,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: str = "cosine",
        max_seq_length: int | None = None,
        pruning: dict | None = None,
        **kwargs,
    ):
        for field, value, known in (
            ("pooling_type", pooling_type, POOLING_TYPES),
            ("mask_type", mask_type, MASK_TYPES),
            ("padding_side", padding_side, ("right",)),
        ):
            if value not in known:
                raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(map(repr, known))}")
        self.text_config = _as_config(text_config, BidirectionalMistralConfig)
        self.latent_attention_config = _as_config(latent_attention_config, LatentAttentionConfig)
        kwargs.pop("hidden_size", None)  # the width of the embeddings, which follows from the parts
        self.hidden_size = self.latent_attention_config.projection_dim or self.text_config.hidden_size
        self.pooling_type = pooling_type
        self.mask_type = mask_type
        self.padding_side = padding_side
        self.add_pad_token = add_pad_token
        self.is_mask_instruction = is_mask_instruction
        self.add_eos = add_eos
        if latent_attention_is_folded and pooling_type != "latent_attention":
            raise ValueError(f"latent_attention_is_folded is set, and pooling_type {pooling_type!r} has no latents")
        self.latent_attention_is_folded = latent_attention_is_folded
        self.prompts = prompts or {}
        self.default_prompt_name = default_prompt_name
        self.similarity_fn_name = similarity_fn_name
        self.pruning = pruning
        self.max_position_embeddings = self.text_config.max_position_embeddings
        kwargs.pop("max_position_embeddings", None)  # the decoder's counts
        self.max_seq_length = max_seq_length or self.max_position_embeddings
        super().__init__(**kwargs)

    @property
    def is_sparse(self) -> bool:
        """Whether single weights of the decoder were set to zero, by `pruning`."""
        return (self.pruning or {}).get("pattern") is not None


def _as_config(value: PretrainedConfig | dict | None, config_class: type[PretrainedConfig]) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    left_out = ("model_type", "_name_or_path")  # the released text config carries a name of the Hub
    return config_class(**{key: field for key, field in (value or {}).items() if key not in left_out})


NVEmbedConfig.register_for_auto_class()
