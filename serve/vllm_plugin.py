"""NV-Embed inside vLLM: the embeddings of `encode`, instruction masked and latents folded, under vLLM's scheduler.

    pip install "nvembed[vllm]"
    vllm serve runs/nv-embed-v2 --runner pooling --trust-remote-code --dtype bfloat16

vLLM calls `register`, the entry point `vllm.general_plugins`, in every process, whatever it serves; the model's own
module is imported only where it is.
"""

import vllm
from transformers import AutoConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from nvembed.configuration_nvembed import NVEmbedConfig


VERSION = "0.32."  # the model is built of parts that vLLM changes between versions

logger = init_logger(__name__)


def register() -> None:
    """Makes `NVEmbedModel`, the architecture that our `config.json` names, known to vLLM."""
    AutoConfig.register(NVEmbedConfig.model_type, NVEmbedConfig, exist_ok=True)
    vllm.ModelRegistry.register_model("NVEmbedModel", "nvembed.serve.vllm_model:NVEmbedForPooling")
    MODELS_CONFIG_MAP["NVEmbedModel"] = NVEmbedChecks


class NVEmbedChecks(VerifyAndUpdateConfig):
    """What vLLM must know of a checkpoint before it is loaded, and what it must not be asked for."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        """
        Raises:
            ValueError: this is another vLLM than the plugin was written for, the checkpoint's tokenizer does not append
                `</s>` by itself, or its weights are quantized.
        """
        config = model_config.hf_config
        if not vllm.__version__.startswith(VERSION):
            raise ValueError(
                f"nvembed serves NV-Embed with vLLM {VERSION}x, and this is {vllm.__version__}: install that version, "
                "or the nvembed that fits this one"
            )
        if config.add_eos:
            raise ValueError(
                f"{model_config.model}: encode() appends </s> to every text (add_eos), and its tokenizer does not, so "
                "vLLM would embed other texts. Write a checkpoint whose tokenizer does: "
                "train/init_checkpoint.py --from_released ... --tokenizer_adds_eos"
            )
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{model_config.model}: its weights are stored quantized (quantization_config), which this plugin does "
                "not load: serve the checkpoint that it was made from"
            )
        config.is_causal = config.mask_type == "c"
        config.is_matryoshka = True  # `dimensions` is `truncate_dim` of `encode`

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """
        Raises:
            ValueError: a text would be embedded in parts, or pooled otherwise than the checkpoint says.
        """
        pooler = vllm_config.model_config.pooler_config
        for asked, option in (
            (vllm_config.scheduler_config.enable_chunked_prefill, "--enable-chunked-prefill"),
            (vllm_config.cache_config.enable_prefix_caching, "--enable-prefix-caching"),
            (getattr(pooler, "enable_chunked_processing", False), "enable_chunked_processing in --pooler-config"),
        ):
            if asked:
                raise ValueError(f"{option}: NV-Embed needs the whole text at once; leave the option out")
        if pooler is not None and pooler.seq_pooling_type not in (None, "MEAN"):
            raise ValueError(
                f"seq_pooling_type in --pooler-config is {pooler.seq_pooling_type!r}; an NV-Embed pools as its "
                "config.json says (pooling_type): leave the option out"
            )
