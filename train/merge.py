"""Averages the weights of checkpoints that were trained from one base: of several seeds, or of several mixtures.

    python train/merge.py --models runs/seed-42 runs/seed-43 runs/seed-44 --output_dir runs/merged
    python train/merge.py --models runs/a runs/b --weights 3 1 --output_dir runs/merged

Model soups (Wortsman et al., arXiv 2203.05482), not in the paper. What was trained from one base lies close enough
together that the average is often better than each; of different bases it is noise.
"""

import math
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from nvembed.eval.commands import errors_in_one_line
from nvembed.modeling_nvembed import NVEmbedModel
from nvembed.train.card import continue_card
from nvembed.train.certificate import merged_certificate, write_certificate
from nvembed.train.checkpoints import check_output_dir, write_checkpoint
from nvembed.train.compress.checkpoint import load_uncompressed
from nvembed.train.compress.sparsity import check_pattern


@dataclass
class MergeArguments:
    models: list[str] = field(metadata={"help": "Two or more merged checkpoints of one shape: folders or Hub names."})
    output_dir: str = field(metadata={"help": "Folder to write; must not hold a checkpoint."})
    weights: list[float] | None = field(default=None, metadata={"help": "One for each model; None: equal ones."})

    def __post_init__(self):
        if len(self.models) < 2:
            raise ValueError(f"models is {self.models}; name two or more")
        if self.weights is None:
            self.weights = [1.0] * len(self.models)
        if len(self.weights) != len(self.models) or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights is {self.weights} for {len(self.models)} models; each needs one above 0")


def merge(models: list[str], weights: list[float]) -> NVEmbedModel:
    """The weighted mean of checkpoints, summed in fp32, in the dtype of the first; one is in memory beside the sum.

    Raises:
        ValueError: as `load_uncompressed`; they are centred; a checkpoint has another config or tokenizer than the
            first; the mean of pruned ones is no longer sparse.
    """
    merged = load_uncompressed(models[0], None, "merge")
    if merged.config.latent_attention_config.subtract_mean:
        raise ValueError(
            f"{models[0]} subtracts the mean of its own embeddings, which is not that of the merged model's: merge the "
            "checkpoints before train/center.py, and center the result"
        )
    dtype = merged.dtype
    merged.float()
    total, sums = sum(weights), merged.state_dict()
    for tensor in sums.values():
        tensor.mul_(weights[0] / total)
    for name, weight in zip(models[1:], weights[1:], strict=True):
        other = load_uncompressed(name, None, "merge")
        check_alike(merged, models[0], other, name)
        for key, tensor in other.state_dict().items():
            sums[key].add_(tensor.float(), alpha=weight / total)
    check_pattern(merged.embedding_model, merged.config.pruning)
    return merged.to(dtype)


def check_alike(first: NVEmbedModel, first_name: str, other: NVEmbedModel, name: str) -> None:
    """Raises a `ValueError` if two models differ in more than their weights."""
    ours, theirs = (flat(model.config.to_dict()) for model in (first, other))
    for key in ours.keys() | theirs.keys():
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{name} has {key} {theirs.get(key)!r} and {first_name} {ours.get(key)!r}: only checkpoints of one "
                "shape, trained from one base, have a mean"
            )
    if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ValueError(f"{name} has another tokenizer than {first_name}: they were not trained from one base")


def flat(config: dict) -> dict:
    """A config's fields by name, its parts' as `part.field`, but for what says nothing of the weights."""
    left_out = ("_name_or_path", "dtype", "transformers_version", "prompts", "default_prompt_name")
    fields = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            fields |= {f"{key}.{name}": part for name, part in flat(value).items()}
        elif key not in left_out:
            fields[key] = value
    return fields


def main(args: MergeArguments) -> None:
    check_output_dir(args.output_dir)
    certificate = merged_certificate(args.models)
    model = merge(args.models, args.weights)
    parts = [f"`{name}` ({weight:g})" for name, weight in zip(args.models, args.weights)]
    text = (
        f"`train/merge.py` of nvembed: the mean of the weights of {', '.join(parts)}. The training before this step, "
        "the license and the example are those in the first one's card; the others have cards of their own."
    )

    def add_files(folder) -> None:
        write_certificate(folder, certificate)
        continue_card(args.models[0], None, folder, args.output_dir, "merge", text, args.models[1:])

    write_checkpoint(model, args.output_dir, add_files)
    print(text)


if __name__ == "__main__":
    with errors_in_one_line():
        main(*HfArgumentParser(MergeArguments).parse_args_into_dataclasses())
