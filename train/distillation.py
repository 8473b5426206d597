"""What a student lacks of its teacher: states layer by layer, scores, similarities, embeddings (paper, Appendix A)."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nvembed.eval.models import load_model
from nvembed.eval.sharding import gather, is_distributed
from nvembed.modeling_nvembed import NVEmbedModel, NVEmbedModelOutput
from nvembed.train.distill_arguments import SIMILARITY_TEMPERATURE, DistillArguments
from nvembed.train.losses import NO_TEXT, Contrast, TeacherScores
from nvembed.train.teacher import EmbeddingTeacher, StatesTeacher


class Distillation:
    """The teacher's part of the loss of a batch; each part is a mean over the tokens, rows or texts of a process.

    - states: the squared error of the states after each layer but the last, summed over layers, and of the last
      states: the student's, behind its own pooling layers if it has any, against the teacher's behind its latent
      attention. A student without latents so learns to do their work in its decoder.
    - scores: the Kullback-Leibler divergence of the softmax over a row's candidates (`losses.contrast`).
    - similarities: the same divergence of the softmax over each text's cosines with all others of the batch, queries
      and passages alike, also those that the contrastive loss leaves out, over all processes (`similarity_divergence`).
    - embeddings: 1 - cosine, or the squared error of a dimension, of every text of the batch.

    Args:
        layers: the teacher's layer, from 0, for each of the student's but the last.
    """

    def __init__(self, args: DistillArguments, teacher: StatesTeacher | EmbeddingTeacher, layers: Sequence[int] = ()):
        self.args, self.teacher, self.layers = args, teacher, list(layers)
        self._embedded: Tensor | None = None  # the teacher's embeddings of the batch at hand

    def observer(self, batch: dict) -> Callable[[NVEmbedModelOutput, dict], Tensor] | None:
        """For `embed_and_observe`: a chunk's share of the states' error; None if states are not compared."""
        if "states" not in self.args.kd_losses:
            return None
        tokens = sum(sum(chunk["lengths"]) for chunk in batch["chunks"])
        is_relative = self.args.states_error != "absolute"

        def observe(output: NVEmbedModelOutput, chunk: dict) -> Tensor:
            theirs = self.teacher.run(chunk)
            pairs = [(output.hidden_states[i + 1], theirs.hidden_states[j + 1]) for i, j in enumerate(self.layers)]
            pairs.append((output.last_hidden_state, theirs.last_hidden_state))
            return sum(states_error(x, y, is_relative).sum() for x, y in pairs) / tokens

        return observe

    def scores(self, batch: dict) -> TeacherScores | None:
        """The teacher's embeddings of a batch for `contrast`; None if scores are not compared."""
        if "scores" not in self.args.kd_losses:
            return None
        embeddings = self._embed(batch)
        temperature = self.args.teacher_temperature or self.args.temperature
        return TeacherScores(embeddings[batch["query_index"]], embeddings[batch["passage_index"]], temperature)

    def losses(self, batch: dict, embeddings: Tensor, observed: Tensor | None, rows: Contrast) -> dict[str, Tensor]:
        """The parts of the loss by name, scalars.

        Args:
            embeddings: the student's, `[texts, width]`.
            observed: the sum of what `observer` gave.
        """
        parts = {}
        if observed is not None:
            parts["states"] = observed
        if rows.divergence is not None:
            parts["scores"] = rows.divergence.mean()
        if "similarities" in self.args.kd_losses:
            places = torch.cat([batch["query_index"], batch["passage_index"].flatten()])
            ids = torch.cat([batch["query_ids"], batch["passage_ids"].flatten()])
            is_query = torch.arange(len(ids), device=ids.device) < len(batch["query_ids"])
            theirs, temperature = self._embed(batch)[places], self.args.similarity_temperature or SIMILARITY_TEMPERATURE
            part = similarity_divergence(embeddings[places], theirs, ids, is_query, temperature, self.args.matryoshka)
            parts["similarities"] = part
        if "embeddings" in self.args.kd_losses:
            theirs = self._embed(batch).to(embeddings.dtype)
            if self.args.embedding_distance == "mse":
                parts["embeddings"] = F.mse_loss(embeddings, theirs)
            else:
                parts["embeddings"] = (1 - torch.cosine_similarity(embeddings, theirs, dim=-1)).mean()
        self._embedded = None
        return parts

    def _embed(self, batch: dict) -> Tensor:
        """The teacher's embeddings of the batch's texts, once."""
        if self._embedded is None:
            self._embedded = self.teacher.embed(batch)
        return self._embedded


def states_error(ours: Tensor, theirs: Tensor, is_relative: bool) -> Tensor:
    """The squared error of each token's states, `[tokens, hidden]` -> fp32 `[tokens]`.

    Relative to the squared length of the teacher's, or the mean over dimensions.
    """
    error, theirs = (ours.float() - theirs.float()).square(), theirs.float()
    return error.sum(-1) / theirs.square().sum(-1).clamp(min=1e-12) if is_relative else error.mean(-1)


def similarity_divergence(
    ours: Tensor,
    theirs: Tensor,
    ids: Tensor,
    is_query: Tensor,
    temperature: float,
    prefixes: Mapping[int, float] | None = None,
) -> Tensor:
    """How far a student's similarities of texts are from the teacher's; the embeddings may differ in width.

    The Kullback-Leibler divergence of the softmax over each text's cosines / `temperature` with all other texts of the
    batch, on all processes. Equal queries, and equal passages, count once; a text is not compared with itself in the
    other role. It still teaches where all negatives have become easy and the contrastive loss is near 0. Not in the
    paper; relational distillation (Park et al., arXiv 1904.05068) compares distances likewise. Takes memory for the
    square of the texts.

    Each process returns the share of its own texts, so that the mean over processes is the mean over texts.

    Args:
        ours, theirs: L2-normalized, `[texts, width]`; as many texts on every process.
        ids: of the texts (`nvembed.eval.files.text_id`), `[texts]`; `NO_TEXT` in empty slots.
        is_query: which are queries, `[texts]`.
        temperature: divisor of both models' cosines.
        prefixes: number of the student's dimensions -> weight, as in `matryoshka_contrast`.

    Returns:
        A scalar; a text that has no other to be compared with adds 0.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    all_ids, all_queries = gather(ids), gather(is_query)
    counted = torch.where(all_queries, is_first(all_ids, all_queries), is_first(all_ids, ~all_queries))
    counted &= all_ids != NO_TEXT
    own = counted[rank * len(ids) : (rank + 1) * len(ids)]
    is_same = ids[own][:, None] == all_ids[counted]
    hidden = is_same & ~is_same.all(1, keepdim=True)  # a softmax over nothing is no number, nor are its gradients

    def log_probabilities(embeddings: Tensor) -> Tensor:
        cosines = embeddings[own] @ gather(embeddings)[counted].T
        return (cosines.float() / temperature).masked_fill(hidden, float("-inf")).log_softmax(-1)

    target = log_probabilities(theirs)

    def divergence(embeddings: Tensor) -> Tensor:
        # Of equal texts, both are -inf, whose difference is not 0.
        gap = (target - log_probabilities(embeddings)).masked_fill(is_same, 0.0)
        return (target.exp().masked_fill(is_same, 0.0) * gap).sum() * processes / counted.sum()

    prefixes = prefixes or {}
    total = divergence(ours)
    for width, weight in prefixes.items():
        total = total + weight * divergence(F.normalize(ours[:, :width], dim=-1))
    return total / (1 + sum(prefixes.values()))


def is_first(ids: Tensor, among: Tensor) -> Tensor:
    """Whether no earlier one of those `among` has the same id, `[ids]` -> bool `[ids]`; False for the rest."""
    distinct, inverse = ids.unique(return_inverse=True)
    places = torch.arange(len(ids), device=ids.device)
    first = places.new_full((len(distinct),), len(ids)).scatter_reduce(0, inverse[among], places[among], "amin")
    return first[inverse] == places


def match_layers(student: NVEmbedModel, teacher: NVEmbedModel, layer_map: Sequence[int] | None) -> list[int]:
    """The teacher's layer for each of the student's but the last, whose states are those behind the pooling layers.

    Never the teacher's last, whose states are seen behind its final norm alone.

    Raises:
        ValueError: `layer_map` has another length, or a layer that the teacher does not have.
    """
    ours, theirs = (model.config.text_config.num_hidden_layers for model in (student, teacher))
    if layer_map is None:
        kept, of_teacher = ((model.config.pruning or {}).get("layers") for model in (student, teacher))
        if kept is not None and of_teacher is None and max(kept) < theirs:
            return kept[:-1]
        return [min(round((i + 1) * theirs / ours), theirs - 1) - 1 for i in range(ours - 1)] if theirs > 1 else []
    if len(layer_map) != ours - 1 or not all(0 <= layer < theirs - 1 for layer in layer_map):
        raise ValueError(
            f"layer_map is {list(layer_map)}; it must have {ours - 1} of the teacher's layers, 0 to {theirs - 2}, one "
            f"for each of the student's {ours} but the last, which is compared with the teacher's last"
        )
    return list(layer_map)


def add_projection(student: NVEmbedModel, width: int) -> None:
    """Gives the student embeddings of another width, by a linear map that is trained and saved with it.

    Raises:
        ValueError: it has a projection to yet another width, or its embeddings are centred.
    """
    config = student.config
    if config.latent_attention_config.subtract_mean:
        raise ValueError(
            f"the student's embeddings are centred (subtract_mean) and to be projected to {width} dimensions: start "
            "from the checkpoint before train/center.py"
        )
    if config.latent_attention_config.projection_dim is not None:
        raise ValueError(
            f"the student's embeddings are projected to {config.hidden_size} dimensions and the teacher's have "
            f"{width}; start from a student without a projection"
        )
    config.latent_attention_config.projection_dim = config.hidden_size = width
    projection = nn.Linear(config.text_config.hidden_size, width, bias=False)
    nn.init.orthogonal_(projection.weight)
    student.latent_attention_model.projection = projection.to(student.device, student.dtype)


def prepare_distillation(args: DistillArguments, student: NVEmbedModel, max_length: int) -> Distillation:
    """Loads the teacher and, where embeddings of another width are compared, projects the student's to it.

    Raises:
        ValueError: teacher and student have no measure of those asked for in common, or as `match_layers` and
            `add_projection`.
    """
    if "states" in args.kd_losses:
        teacher = StatesTeacher(args.teacher, args.teacher_revision, student)
        masks = [model.config.is_mask_instruction for model in (teacher.model, student)]
        if set(args.kd_losses) > {"states"} and masks[0] != masks[1]:  # it pools the student's batches
            raise ValueError(
                f"teacher {args.teacher} has is_mask_instruction {masks[0]} and the student {masks[1]}: its embeddings "
                "would be pooled as the student's, not as its own; leave states out of kd_losses, or all else"
            )
        layers = match_layers(student, teacher.model, args.layer_map)
        width = teacher.model.config.hidden_size
    else:
        model = load_model(args.teacher, args.teacher_revision, max_length)
        if args.teacher_instruction is not None:
            model.check_reads("teacher_instruction", args.teacher_instruction, "leave it out")
        teacher, layers = EmbeddingTeacher(model, args.teacher_instruction), []
        width = model.embed(["one text"], "").shape[1]
    if "embeddings" in args.kd_losses and width != student.config.hidden_size:
        add_projection(student, width)
    if "states" in args.kd_losses and width != student.config.hidden_size:
        raise ValueError(
            f"the teacher's last states are {width} wide and the student's {student.config.hidden_size}, since one of "
            "them projects them (projection_dim): leave states out of kd_losses"
        )
    return Distillation(args, teacher, layers)
