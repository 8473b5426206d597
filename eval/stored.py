"""Weights as they are stored, also those inside of quantized and sparse tensors."""

from torch import Tensor, nn


def stored_parts(tensor: Tensor) -> list[Tensor]:
    """A tensor, or the tensors that a quantized or sparse one of torch's subclasses is stored as."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in stored_parts(getattr(tensor, name))]


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    parts = (part for parameter in module.parameters() for part in stored_parts(parameter.data))
    return sum(part.numel() * part.element_size() for part in parts)
