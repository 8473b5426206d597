"""nvembed: trains, measures and serves NV-Embed text-embedding models (arXiv 2405.17428)."""

from transformers import AutoConfig, AutoModel

from .configuration_nvembed import NVEmbedConfig
from .modeling_nvembed import NVEmbedModel


__version__ = "0.1.0"
__all__ = ["NVEmbedConfig", "NVEmbedModel"]

AutoConfig.register(NVEmbedConfig.model_type, NVEmbedConfig)
AutoModel.register(NVEmbedConfig, NVEmbedModel)
