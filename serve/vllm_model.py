"""vLLM's model class for our checkpoints; `nvembed.serve.vllm_plugin` registers it.

The decoder is vLLM's own Llama (or Qwen3) under the name `embedding_model`, so that our tensors load as they are named,
with `is_causal: false`. The pooling is ours, on the token states behind the final norm.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.activations import PoolerNormalize
from vllm.model_executor.layers.pooler.seqwise.heads import EmbeddingPoolerHead
from vllm.model_executor.layers.pooler.seqwise.methods import SequencePoolingMethod
from vllm.model_executor.layers.pooler.seqwise.poolers import SequencePooler
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.qwen3 import Qwen3Model
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from nvembed.modeling_nvembed import POOLINGS, FoldedLatentAttention, LatentAttention, MeanPooling
from nvembed.serve.instructions import InstructionFinder
from nvembed.texts_nvembed import PackedLayout, load_tokenizer


class NVEmbedPooling(SequencePoolingMethod):
    """The checkpoint's pooling over packed texts, without their instructions.

    Args:
        block: returns the pooling in use, which folding replaces after this object is made.
    """

    def __init__(self, block: Callable[[], MeanPooling], finder: InstructionFinder):
        super().__init__()
        self.block, self.finder = block, finder

    def get_supported_tasks(self):
        return {"embed"}

    def get_pooling_updates(self, task) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: Tensor, pooling_metadata) -> Tensor:
        """Maps states of all texts, `[tokens, hidden]`, to fp32 embeddings `[texts, hidden]`, not normalized."""
        if pooling_metadata.get_pooling_cursor().is_partial_prefill():
            raise RuntimeError("NV-Embed needs the whole text at once, and vLLM has split one")
        token_ids = [ids.tolist() for ids in pooling_metadata.get_prompt_token_ids_cpu()]
        if not token_ids:
            return hidden_states.new_empty((0, hidden_states.shape[-1]), dtype=torch.float32)
        pool_mask = torch.cat([torch.arange(len(ids)) >= self.finder.length(ids) for ids in token_ids])
        layout = PackedLayout([len(ids) for ids in token_ids])
        block = self.block()
        return block.reduce(block(hidden_states, layout), pool_mask, layout)


@default_pooling_type(seq_pooling_type="MEAN")
class NVEmbedForPooling(nn.Module):
    """vLLM's model class for our checkpoints."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        config = model_config.hf_config
        text_config = deepcopy(config.text_config)
        text_config.is_causal = config.mask_type == "c"
        text_config.sliding_window = None
        has_bias, decoder = getattr(text_config, "qkv_bias", False), LlamaModel
        if getattr(text_config, "qk_norm", False):
            decoder, text_config.attention_bias = Qwen3Model, has_bias  # LlamaModel reads `qkv_bias`
        self.embedding_model = decoder(
            vllm_config=vllm_config.with_hf_config(text_config), prefix=maybe_prefix(prefix, "embedding_model")
        )
        pooling = FoldedLatentAttention if config.latent_attention_is_folded else POOLINGS[config.pooling_type]
        self.latent_attention_config = config.latent_attention_config
        self.latent_attention_model = pooling(config.latent_attention_config).eval()
        tokenizer = load_tokenizer(
            model_config.tokenizer, config.add_pad_token, text_config.vocab_size,
            revision=model_config.tokenizer_revision,
        )  # fmt: skip
        self.pooler = SequencePooler(
            NVEmbedPooling(lambda: self.latent_attention_model, InstructionFinder(tokenizer, config)),
            EmbeddingPoolerHead(
                head_dtype=model_config.head_dtype,
                activation=PoolerNormalize() if config.latent_attention_config.output_normalize else None,
            ),
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embedding_model.embed_input_ids(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor, intermediate_tensors=None, inputs_embeds=None) -> Tensor:
        return self.embedding_model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads our tensors by their names, and folds the latent attention.

        Raises:
            ValueError: the checkpoint lacks a tensor of the pooling; vLLM checks those of the decoder.
        """
        block, prefix = self.latent_attention_model, "latent_attention_model."
        constants = {f"{prefix}{name}": buffer for name, buffer in block.named_buffers()}
        loaded = set()

        def parameters() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name in constants:  # vLLM's loader knows parameters alone
                    constants[name].copy_(tensor)
                    loaded.add(name)
                else:
                    yield name, tensor

        loaded |= AutoWeightsLoader(self).load_weights(parameters())
        if missing := {*constants, *(f"{prefix}{name}" for name, _ in block.named_parameters())} - loaded:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of its pooling; the first is {min(missing)}")
        if isinstance(block, LatentAttention):
            self.latent_attention_model = FoldedLatentAttention.fold(block, self.latent_attention_config)
            loaded |= {f"{prefix}{name}" for name, _ in self.latent_attention_model.named_parameters()}
        return loaded
