"""Loads checkpoints that are to be compressed."""

from nvembed.configuration_nvembed import NVEmbedConfig
from nvembed.eval.models import find_config
from nvembed.modeling_nvembed import NVEmbedModel, find_base_of_adapter
from nvembed.train.checkpoints import quantized_by


def load_uncompressed(name: str, revision: str | None, purpose: str, dtype: str = "auto") -> NVEmbedModel:
    """A checkpoint in main memory, in the dtype it is stored in or another.

    Raises:
        ValueError: there is no such checkpoint, its weights are quantized, it is an adapter, or, unless `purpose` is
            "quantize", its latents are folded.
    """
    if find_base_of_adapter(name, revision=revision) is not None:
        raise ValueError(f"{name} is an adapter; {purpose} the merged checkpoint (the folder around it)")
    saved, _ = find_config(name, revision)
    if saved.get("model_type") != NVEmbedConfig.model_type:
        raise ValueError(f"{name} is no NV-Embed checkpoint but {saved.get('model_type')!r}; name one")
    config = NVEmbedConfig(**saved)
    if (method := quantized_by(config)) is not None:
        raise ValueError(f"{name} is quantized already ({method}); {purpose} the checkpoint that it was made from")
    if config.latent_attention_is_folded and purpose != "quantize":
        raise ValueError(
            f"{name} has a folded latent attention, which cannot be trained again after pruning: {purpose} the "
            "unfolded checkpoint that it was made from, and fold the result"
        )
    return NVEmbedModel.from_pretrained(name, revision=revision, dtype=dtype)
