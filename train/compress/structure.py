"""Smaller decoders: whole layers, MLP neurons and attention heads dropped by what they do (Minitron, arXiv 2407.14679).

What is left has the same shapes from layer to layer, so it is an ordinary, smaller checkpoint.
"""

import torch
from torch import Tensor, nn

from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.train.compress.calibration import LayerInputs, walk_layers


def drop_layers(model: NVEmbedModel, chunks: list[dict], device: str, num_layers: int) -> list[int]:
    """Keeps the layers that turn the states furthest (`LayerInputs.influence`); returns their places.

    Raises:
        ValueError: the model does not have more layers than that, or it is to have none.
    """
    decoder = model.embedding_model
    _check_smaller("num_layers", num_layers, len(decoder.layers))
    influence: list[float] = []
    walk_layers(model, chunks, device, lambda index, layer, inputs: influence.append(inputs.influence))
    kept = sorted(sorted(range(len(influence)), key=lambda i: -influence[i])[:num_layers])
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in kept)
    model.config.text_config.num_hidden_layers = num_layers
    return kept


def narrow(
    model: NVEmbedModel,
    chunks: list[dict],
    device: str,
    intermediate_size: int | None = None,
    num_key_value_heads: int | None = None,
) -> None:
    """Keeps in every layer the neurons, and the key heads with their query heads, whose outputs are largest.

    The measure is the L2 norm of an activation over all calibration tokens.

    Raises:
        ValueError: the model does not have more of them, or there are to be none.
    """
    text = model.config.text_config
    if intermediate_size is not None:
        _check_smaller("intermediate_size", intermediate_size, text.intermediate_size)
    if num_key_value_heads is not None:
        _check_smaller("num_key_value_heads", num_key_value_heads, text.num_key_value_heads)
    queries_per_key = text.num_attention_heads // text.num_key_value_heads

    def change(index: int, layer: nn.Module, inputs: LayerInputs) -> None:
        if intermediate_size is not None:
            neurons = _largest(inputs.moments["mlp.down_proj"].diagonal(), intermediate_size)
            _keep_rows(layer.mlp.gate_proj, neurons)
            _keep_rows(layer.mlp.up_proj, neurons)
            _keep_columns(layer.mlp.down_proj, neurons)
        if num_key_value_heads is not None:
            attention, width = layer.self_attn, text.head_dim
            outputs = inputs.moments["self_attn.o_proj"].diagonal().unflatten(0, (-1, queries_per_key * width))
            heads = _largest(outputs.sum(-1), num_key_value_heads)
            keys, queries = _members(heads, width), _members(heads, queries_per_key * width)
            _keep_rows(attention.q_proj, queries)
            _keep_rows(attention.k_proj, keys)
            _keep_rows(attention.v_proj, keys)
            _keep_columns(attention.o_proj, queries)

    walk_layers(model, chunks, device, change)
    if intermediate_size is not None:
        text.intermediate_size = intermediate_size
    if num_key_value_heads is not None:
        text.num_key_value_heads = num_key_value_heads
        text.num_attention_heads = num_key_value_heads * queries_per_key


def _check_smaller(name: str, asked: int, there: int) -> None:
    if not 0 < asked < there:
        raise ValueError(f"{name} is {asked} and the model has {there}; it must be 1 to {there - 1}, or left out")


def _largest(values: Tensor, count: int) -> Tensor:
    return values.topk(count).indices.sort().values


def _members(groups: Tensor, width: int) -> Tensor:
    return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()


def _keep_rows(module: nn.Linear, rows: Tensor) -> None:
    module.weight = nn.Parameter(module.weight[rows].clone(), module.weight.requires_grad)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias[rows].clone(), module.bias.requires_grad)
    module.out_features = len(rows)


def _keep_columns(module: nn.Linear, columns: Tensor) -> None:
    module.weight = nn.Parameter(module.weight[:, columns].clone(), module.weight.requires_grad)
    module.in_features = len(columns)
