"""Which checkpoints can be compressed (further), and what they say about it."""

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.modeling_nvembed import NVEmbedModel


def is_compressed(config: NVEmbedConfig) -> bool:
    """Whether the weights are stored quantized."""
    return getattr(config, "quantization_config", None) is not None


def load_uncompressed(name: str, revision: str | None, purpose: str) -> NVEmbedModel:
    """A checkpoint in main memory in the dtype it is stored in.

    Raises:
        ValueError: its weights are quantized, it is an adapter, or, unless `purpose` is "quantize", its latents are
            folded.
    """
    config = NVEmbedConfig.from_pretrained(name, revision=revision)
    if is_compressed(config):
        raise ValueError(
            f"{name} is quantized already ({config.quantization_config['quant_method']}); {purpose} the checkpoint "
            "that it was made from"
        )
    if config.latent_attention_is_folded and purpose != "quantize":
        raise ValueError(
            f"{name} has a folded latent attention, which cannot be trained again after pruning: {purpose} the "
            "unfolded checkpoint that it was made from, and fold the result"
        )
    model = NVEmbedModel.from_pretrained(name, revision=revision, dtype="auto")
    if getattr(model, "peft_config", None):
        raise ValueError(f"{name} is an adapter; {purpose} the merged checkpoint (the folder around it)")
    return model
