"""LoRA on the decoder: adds it, and merges it into weights that load without peft."""

import copy
import re
from difflib import get_close_matches
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save
from trl import get_peft_config

from nvembed.modeling_nvembed import NVEmbedModel, save_sentence_transformers_files
from nvembed.texts_nvembed import save_tokenizer
from nvembed.train.arguments import ModelArguments
from nvembed.train.checkpoints import quantized_by
from nvembed.train.keep_zeros import keep_zeros_in_lora


POOLING = "latent_attention_model"
ADAPTER = "adapter"  # its folder within the output folder of a stage


def add_adapter(model: NVEmbedModel, model_args: ModelArguments) -> NVEmbedModel | PeftModel:
    """Adds LoRA to the decoder's linear layers; the latent attention is trained in full, in fp32.

    Raises:
        ValueError: the model already has an adapter, its latent attention is folded, quantized weights would have to be
            trained directly, or a list of modules does not match the model (see `resolve_modules`).
    """
    if model.config.latent_attention_is_folded:
        raise ValueError(
            f"{model_args.model_name_or_path} has a folded latent attention, which is for evaluation alone; train the "
            "unfolded checkpoint that it was made from"
        )
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{model_args.model_name_or_path} is an adapter, and training would begin without it: give the merged "
            "checkpoint (the folder that training wrote around it), or merge it first: "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload()"
        )
    if quantized_by(model.config) == "torchao":
        raise ValueError(
            f"{model_args.model_name_or_path} is quantized by torchao, which is for using it: train the checkpoint "
            "that it was made from, and quantize the result"
        )
    if model.config.is_sparse and is_quantized(model):
        raise ValueError(
            f"{model_args.model_name_or_path} is pruned, and load_in_4bit or load_in_8bit would round its zeros, which "
            "would not stay: train without, and quantize afterwards (train/compress/quantize.py)"
        )
    config = get_peft_config(model_args)
    if config is None and is_quantized(model):
        raise ValueError(
            "quantized weights cannot be trained: drop load_in_4bit and load_in_8bit, or set use_peft: true"
        )
    if config is None:
        return model.float()  # as below: full fine-tuning in bf16 would lose small updates
    resolve_modules(model, config)
    if model.config.is_sparse:
        keep_zeros_in_lora(config)
    model.latent_attention_model.float()  # bf16 weights would lose updates of the size of the paper's learning rate
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
    return adapted


def resolve_modules(model: NVEmbedModel, config: LoraConfig) -> None:
    """Checks `lora_modules_to_save` and `lora_target_modules` against the model and expands the former to full names.

    peft itself skips a name that matches nothing, and takes every module whose name ends with these letters.

    Raises:
        ValueError: a name matches no module, or a module without weights; a module trained in full is inside another
            one, or contains everything that a target matches.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    in_full: dict[str, str] = {}  # name of a module -> how it was asked for
    for asked in config.modules_to_save or ():
        found = _matching(modules, asked)
        if asked == POOLING and not any(True for _ in model.latent_attention_model.parameters()):
            continue  # mean and eos pooling have nothing to train
        if not found:
            raise ValueError(f"lora_modules_to_save: no module is called {asked!r}{_similar(modules, asked)}")
        for name in found:
            if not any(True for _ in modules[name].parameters()):
                raise ValueError(f"lora_modules_to_save: {name} has no weights to train; leave {asked!r} out")
        in_full |= dict.fromkeys(found, asked)
    for name, asked in in_full.items():
        around = next((other for other in in_full if name.startswith(f"{other}.")), None)
        if around is not None:
            raise ValueError(
                f"lora_modules_to_save: {asked!r} is {name}, among others, which lies within {around} and is trained "
                f"with it; leave {asked!r} out, or name the ones that you mean in full, such as "
                f"{next((other for other in _matching(modules, asked) if not other.startswith(around)), around)}"
            )
    config.modules_to_save = list(in_full) or None

    parameters = [name for name, _ in model.named_parameters()]
    for asked in config.target_parameters or ():
        if not any(f".{name}".endswith(f".{asked}") for name in parameters):
            raise ValueError(f"lora_target_parameters: no parameter is called {asked!r}; there is {parameters[1]}")
    targets = config.target_modules
    if not targets and not config.target_parameters:
        raise ValueError("lora_target_modules is empty: name the layers that get LoRA, or set use_peft: false")
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        config.target_modules = targets = {targets}  # TRL makes a pattern of a single name
    if isinstance(targets, str):
        if targets != "all-linear" and not any(re.fullmatch(targets, name) for name in modules):
            raise ValueError(f"lora_target_modules: the pattern {targets!r} matches no module")
        return
    for asked in sorted(targets or ()):
        found = _matching(modules, asked)
        if not found:
            raise ValueError(f"lora_target_modules: no module is called {asked!r}{_similar(modules, asked)}")
        if all(any(f"{name}.".startswith(f"{other}.") for other in in_full) for name in found):
            raise ValueError(
                f"lora_target_modules: {asked!r} is {found[0]}, which lora_modules_to_save trains in full; name it in "
                "one of the two lists"
            )


def _matching(modules: dict, asked: str) -> list[str]:
    return [name for name in modules if f".{name}".endswith(f".{asked}")]


def _similar(modules: dict, asked: str) -> str:
    names = {name.rsplit(".", 1)[-1] for name in modules} - {str(i) for i in range(len(modules))}
    close = get_close_matches(asked, names, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(sorted(names))}"


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Saves an adapter with all that `AutoModel` and `SentenceTransformer` need to load it but the base's weights."""
    base = model.get_base_model()
    for config in model.peft_config.values():
        # A relative path would only load from one working directory.
        if Path(config.base_model_name_or_path or "").is_dir():
            config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())
    model.save_pretrained(folder)
    save_tokenizer(base.tokenizer, str(folder))
    save_sentence_transformers_files(base.config, str(folder))
    custom_object_save(base, str(folder))


def is_quantized(model: NVEmbedModel | PeftModel) -> bool:
    """Whether the decoder's matrices are quantized to 8 or 4 bit by bitsandbytes."""
    return getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)


def merge_adapter(model: NVEmbedModel | PeftModel, dtype: torch.dtype | None = None) -> NVEmbedModel:
    """The model with LoRA merged into its weights, all in the decoder's dtype; it loads without peft.

    On a quantized base, LoRA was trained on the rounded weights, so it is added to the dequantized ones, not to the
    originals, and the sum is not quantized again.

    Args:
        dtype: of the result instead, as full fine-tuning holds all in fp32.
    """
    dtype = decoder_dtype(model) if dtype is None else dtype
    if is_quantized(model):
        model = with_weights(model, dequantized_weights(model))
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    return model.to(dtype)


def decoder_dtype(model: NVEmbedModel | PeftModel) -> torch.dtype:
    """The dtype of the norms as loaded; an adapter may train a copy of them in fp32."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    norm = base.embedding_model.norm
    return getattr(norm, "original_module", norm).weight.dtype


def dequantized_weights(model: NVEmbedModel | PeftModel) -> dict[str, Tensor]:
    """The weights in main memory, 8- and 4-bit matrices dequantized to the dtype of the norms."""
    # Not from the parameters: on a CPU, bitsandbytes rearranges 4-bit ones, and `state_dict` restores their order.
    state = model.state_dict()
    names = (name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    weights = {name: state[name].cpu() for name in names if name in state}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and type(module.weight).__name__ in ("Params4bit", "Int8Params"):
            matrix = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None)).detach()
            weights[f"{name}.weight"] = matrix.to("cpu", decoder_dtype(model))
    return weights


def with_weights(model: NVEmbedModel | PeftModel, weights: dict[str, Tensor]) -> NVEmbedModel | PeftModel:
    """A copy of the model and its adapter with other weights; `model`, whose own weights are shards, is unchanged."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        whole = NVEmbedModel(config)
        if isinstance(model, PeftModel):
            whole = get_peft_model(whole, model.peft_config[model.active_adapter])
    whole.load_state_dict(weights, assign=True)
    (whole.get_base_model() if isinstance(whole, PeftModel) else whole).tokenizer = base.tokenizer
    return whole
