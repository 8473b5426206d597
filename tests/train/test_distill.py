"""Distillation: each part of the loss against its definition, and students trained by the script."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

from nvembed import NVEmbedModel
from nvembed.eval.models import LoadedModel, load_model
from nvembed.train import distillation
from nvembed.train.collator import TripletCollator
from nvembed.train.compress.sparsity import Pattern, decoder_matrices
from nvembed.train.data.source import DatasetSource
from nvembed.train.distill_arguments import DistillArguments
from nvembed.train.distillation import (
    Distillation,
    add_projection,
    match_layers,
    prepare_distillation,
    similarity_divergence,
    states_error,
)
from nvembed.train.gradient_cache import embed_and_observe
from nvembed.train.losses import NO_TEXT, TeacherScores, contrast
from nvembed.train.teacher import EmbeddingTeacher, StatesTeacher
from tests import preloaded
from tests.conftest import SENTENCES
from tests.triplets import prepare


ROOT = Path(__file__).parents[2]


def arguments(tmp_path, **options) -> DistillArguments:
    return DistillArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", teacher="t", **options)


@pytest.mark.parametrize("error", ["relative", "absolute"])
def test_states_are_compared_layer_by_layer_and_behind_the_latents(student, model, teacher_dir, batch, tmp_path, error):
    """Against one text at a time, over chunks, with the unfolded teacher."""
    args = arguments(tmp_path, states_error=error)
    distillation = Distillation(args, StatesTeacher(str(teacher_dir), None, student), [0, 1])
    assert len(batch["chunks"]) > 2
    embeddings, observed = embed_and_observe(student, batch["chunks"], distillation.observer(batch))
    total, tokens = 0.0, 0
    for chunk in batch["chunks"]:
        for ids in chunk["input_ids"].split(chunk["lengths"]):
            with torch.no_grad():
                ours, theirs = (m(ids[None], output_hidden_states=True) for m in (student, model))
            states = [(ours.hidden_states[i], theirs.hidden_states[i]) for i in (1, 2)]
            for x, y in (*states, (ours.last_hidden_state, theirs.last_hidden_state)):
                for a, b in zip(x[0].double(), y[0].double()):
                    squared = (a - b).square()
                    total += float(squared.sum() / b.square().sum() if error == "relative" else squared.mean())
            tokens += len(ids)
    assert observed.item() == pytest.approx(total / tokens, rel=1e-4)
    parts = distillation.losses(batch, embeddings, observed, contrast_of(embeddings, batch))
    assert list(parts) == ["states"]
    observed.backward()
    assert student.embedding_model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def contrast_of(embeddings, batch, teacher=None, **options):
    passages = embeddings[batch["passage_index"]]
    ids = batch["query_ids"], batch["passage_ids"]
    return contrast(embeddings[batch["query_index"]], passages, *ids, teacher=teacher, **options)


def test_gradients_do_not_depend_on_the_chunks(student, teacher_dir, triplets_file, tmp_path):
    rows = list(prepare([DatasetSource(triplets_file, instruction="Find it")], 1))
    gradients = []
    for tokens in (None, 40):
        batch = TripletCollator(student.tokenizer, student.config, 32, 1, chunk_tokens=tokens)(rows)
        distillation = Distillation(arguments(tmp_path), StatesTeacher(str(teacher_dir), None, student), [0, 1])
        student.zero_grad()
        embeddings, observed = embed_and_observe(student, batch["chunks"], distillation.observer(batch))
        (observed + contrast_of(embeddings, batch).losses.mean()).backward()
        gradients.append(student.embedding_model.layers[0].mlp.up_proj.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def test_a_student_that_is_its_teacher_lacks_nothing(teacher_dir, triplets_file, tmp_path):
    student = NVEmbedModel.from_pretrained(teacher_dir)
    rows = list(prepare([DatasetSource(triplets_file, instruction="Find it")], 1))
    batch = TripletCollator(student.tokenizer, student.config, 32, 1)(rows)
    args = arguments(tmp_path, kd_losses=["states", "scores", "similarities", "embeddings"])
    distillation = Distillation(args, StatesTeacher(str(teacher_dir), None, student), [0, 1])
    embeddings, observed = embed_and_observe(student, batch["chunks"], distillation.observer(batch))
    rows = contrast_of(embeddings, batch, distillation.scores(batch))
    parts = distillation.losses(batch, embeddings, observed, rows)
    assert list(parts) == ["states", "scores", "similarities", "embeddings"]
    assert all(part.item() == pytest.approx(0, abs=1e-5) for part in parts.values())


@pytest.mark.parametrize("in_batch_negatives", [True, False])
def test_scores_are_a_kullback_leibler_divergence_over_the_candidates(in_batch_negatives):
    torch.manual_seed(0)
    queries, passages = F.normalize(torch.randn(5, 8), dim=-1), F.normalize(torch.randn(5, 3, 8), dim=-1)
    queries.requires_grad_()
    theirs = F.normalize(torch.randn(5, 4), dim=-1), F.normalize(torch.randn(5, 3, 4), dim=-1)
    query_ids, passage_ids = torch.arange(5), torch.arange(10, 25).view(5, 3)
    passage_ids[2, 2] = -1  # an empty slot
    passage_ids[3, 1] = passage_ids[3, 0]  # the positive again
    options = {"temperature": 0.1, "in_batch_negatives": in_batch_negatives}
    found = contrast(queries, passages, query_ids, passage_ids, **options, teacher=TeacherScores(*theirs, 0.2))
    for row in range(5):
        target = passage_ids[row, 0].item()
        slots = [(r, j) for r in (range(5) if in_batch_negatives else [row]) for j in range(3)]
        left = [(r, j) for r, j in slots if (r, j) == (row, 0) or passage_ids[r, j] not in (-1, target)]
        ours = torch.tensor([queries[row] @ passages[r, j] / 0.1 for r, j in left]).double().log_softmax(0)
        other = torch.tensor([theirs[0][row] @ theirs[1][r, j] / 0.2 for r, j in left]).double().log_softmax(0)
        expected = (other.exp() * (other - ours)).sum().item()
        assert found.divergence[row].item() == pytest.approx(expected, rel=1e-4)
    found.divergence.sum().backward()
    assert queries.grad.isfinite().all() and queries.grad.abs().max() > 0


def test_similarities_are_a_kullback_leibler_divergence_over_all_other_texts():
    torch.manual_seed(0)
    ours, theirs = F.normalize(torch.randn(8, 8), dim=-1).requires_grad_(), F.normalize(torch.randn(8, 4), dim=-1)
    ids = torch.tensor([5, 7, 9, 7, NO_TEXT, 3, 2, 5])
    is_query = torch.arange(8) < 4
    texts = [0, 1, 2, 5, 6, 7]  # but for a query that is there twice, and an empty slot; 0 and 7 are one text

    def expected(ours):
        total = 0.0
        for row in texts:
            others = [other for other in texts if ids[other] != ids[row]]
            log_p, log_q = (
                torch.stack([side[row] @ side[other] / 0.1 for other in others]).double().log_softmax(0)
                for side in (theirs, ours)
            )
            total += (log_p.exp() * (log_p - log_q)).sum().item() / len(texts)
        return total

    found = similarity_divergence(ours, theirs, ids, is_query, 0.1)
    assert found.item() == pytest.approx(expected(ours), rel=1e-4)
    found.backward()
    assert ours.grad.isfinite().all() and (ours.grad.abs().amax(1) > 0).nonzero().flatten().tolist() == texts
    prefixes = {2: 1.0, 5: 0.5}
    weighted = expected(ours) + sum(w * expected(F.normalize(ours[:, :n], dim=-1)) for n, w in prefixes.items())
    found = similarity_divergence(ours, theirs, ids, is_query, 0.1, prefixes)
    assert found.item() == pytest.approx(weighted / 2.5, rel=1e-4)
    alone = similarity_divergence(ours[[0, 7]], theirs[[0, 7]], ids[[0, 7]], is_query[[0, 7]], 0.1)
    ours.grad = None
    alone.backward()
    assert alone.item() == 0 and (ours.grad == 0).all()


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_embeddings_are_compared_text_by_text(student, teacher_dir, batch, tmp_path, distance):
    args = arguments(tmp_path, kd_losses=["embeddings"], embedding_distance=distance)
    teacher = EmbeddingTeacher(load_model(str(teacher_dir), max_length=32))
    distillation = Distillation(args, teacher)
    embeddings, observed = embed_and_observe(student, batch["chunks"], distillation.observer(batch))
    assert observed is None
    part = distillation.losses(batch, embeddings, None, contrast_of(embeddings, batch))["embeddings"]
    model, errors = NVEmbedModel.from_pretrained(teacher_dir), []
    for text, ours in zip(batch["texts"], embeddings.detach()):
        theirs = model.encode([text.text], text.instruction, 32)[0]
        errors.append((1 - ours @ theirs if distance == "cosine" else (ours - theirs).square().mean()).item())
    assert part.item() == pytest.approx(sum(errors) / len(errors), rel=1e-3, abs=1e-6)


def test_layers_are_mapped(student, model):
    assert match_layers(student, model, None) == [0, 1]
    assert match_layers(student, model, [1, 1]) == [1, 1]
    student.config.pruning = {"layers": [0, 2]}
    student.config.text_config.num_hidden_layers = 2
    assert match_layers(student, model, None) == [0]
    student.config.pruning = None
    assert match_layers(student, model, None) == [1]
    model.config.pruning = {"layers": [0, 1, 3]}  # places in yet another model
    student.config.pruning = {"layers": [0, 2]}
    assert match_layers(student, model, None) == [1]
    for wrong in ([0, 1], [2], [-1]):
        with pytest.raises(ValueError, match="layer_map"):
            match_layers(student, model, wrong)


def test_a_projection_is_saved_with_the_student(student, tmp_path, encode_without_nvembed):
    add_projection(student, 20)
    embeddings = student.encode(SENTENCES[:3])
    assert embeddings.shape == (3, 20)
    student.save_pretrained(tmp_path / "projected")
    again = NVEmbedModel.from_pretrained(tmp_path / "projected")
    assert again.config.hidden_size == 20 and torch.allclose(again.encode(SENTENCES[:3]), embeddings, atol=1e-6)
    elsewhere, _ = encode_without_nvembed(tmp_path / "projected", SENTENCES[:3], "", 64)
    assert torch.allclose(elsewhere, embeddings, atol=1e-6)
    under_st = SentenceTransformer(str(tmp_path / "projected"), trust_remote_code=True)
    assert under_st.get_sentence_embedding_dimension() == 20
    assert torch.allclose(torch.from_numpy(under_st.encode(SENTENCES[:3])), embeddings, atol=1e-5)
    folded = NVEmbedModel.from_pretrained(tmp_path / "projected").eval().fold_latent_attention()
    assert torch.allclose(folded.encode(SENTENCES[:3]), embeddings, atol=1e-5)
    with pytest.raises(ValueError, match="without a projection"):
        add_projection(again, 24)


def test_states_error_of_equal_states_is_zero():
    x = torch.randn(4, 8)
    assert states_error(x, x, True).tolist() == [0] * 4
    assert torch.allclose(states_error(2 * x, x, True), torch.ones(4))


def test_a_teacher_is_not_pooled_by_the_students_mask(student, teacher_dir, tmp_path):
    student.config.is_mask_instruction = False
    given = {"output_dir": str(tmp_path), "teacher": str(teacher_dir), "use_cpu": True}
    with pytest.raises(ValueError, match="has is_mask_instruction True and the student False: .* leave states out"):
        prepare_distillation(DistillArguments(**given, kd_losses=["states", "similarities"]), student, 32)
    assert prepare_distillation(DistillArguments(**given, kd_losses=["states"]), student, 32), "they are of every token"


def test_an_instruction_that_a_teacher_does_not_read_is_refused(student, tmp_path, monkeypatch):
    teacher = LoadedModel("t", "r", None, prompts={"default": ""})
    monkeypatch.setattr(distillation, "load_model", lambda *given: teacher)
    args = DistillArguments(str(tmp_path), teacher="t", use_cpu=True, kd_losses=["scores"], teacher_instruction="Find")
    with pytest.raises(ValueError, match="teacher_instruction is 'Find', which t would not read"):
        prepare_distillation(args, student, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "teacher is missing"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"contrastive_weight": -1.0}, "contrastive_weight"),
        ({"kd_losses": ["logits"]}, "states, scores, similarities, embeddings"),
        ({"kd_losses": []}, "states, scores, similarities, embeddings"),
        ({"teacher_cache": "x"}, "leave one out"),
        ({"teacher_temperature": 0.1}, "kd_losses has no scores"),
        ({"similarity_temperature": 0.1}, "kd_losses has no similarities"),
        ({"kd_losses": ["similarities"], "similarity_temperature": 0.0}, "similarity_temperature is 0.0"),
        ({"embedding_distance": "mse"}, "kd_losses has no embeddings"),
        ({"kd_losses": ["scores"], "states_error": "absolute"}, "kd_losses has no states"),
        ({"teacher_instruction": "Find it"}, "leave one out"),
        ({"kd_losses": ["scores"], "layer_map": [1]}, "kd_losses has no states"),
        ({"kd_losses": ["scores"], "teacher_temperature": 0.0}, "teacher_temperature is 0.0"),
    ],
)
def test_bad_settings_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillArguments(**({"output_dir": str(tmp_path), "teacher": "t", "use_cpu": True} | options))


def distil(student, teacher, data, output_dir, *options, run=preloaded.run, rows=8) -> list[dict]:
    """Runs the script and returns its log."""
    command = [
        ROOT / "train/distill.py", "--model_name_or_path", student, "--teacher", teacher,
        "--datasets", data, "--instruction", "Find it", "--num_negatives", "1", "--max_length", "32",
        "--output_dir", output_dir, "--per_device_train_batch_size", rows, "--max_steps", "20", "--use_cpu",
        "--learning_rate", "0.003", "--warmup_steps", "0", "--logging_steps", "5", "--report_to", "none",
        "--lora_dropout", "0", *options,
    ]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--kd_losses", "embeddings", "--teacher_cache", "CACHE", "--contrastive_weight", "0"],
        ["--matryoshka_dims", "8", "16", "--matryoshka_weights", "1", "0.5", "--kd_losses", "scores", "states"],
        ["--similarity_temperature", "0.1", "--kd_losses", "similarities", "--contrastive_weight", "0"],
    ],
)
def test_the_script_trains_a_student_towards_its_teacher(student, teacher_dir, triplets_file, tmp_path, options):
    student.save_pretrained(tmp_path / "student")
    options = [str(tmp_path / "cache") if option == "CACHE" else option for option in options]
    log = distil(tmp_path / "student", teacher_dir, triplets_file, tmp_path / "out", *options)
    for part in set(options) & {"states", "scores", "similarities", "embeddings"}:
        parts = [entry[f"kd/{part}"] for entry in log if f"kd/{part}" in entry]
        assert len(parts) == 4 and parts[-1] < parts[0]
    certificate = json.loads((tmp_path / "out" / "training_data.json").read_text())
    assert certificate["stages"][-1]["stage"] == "distill" and certificate["stages"][-1]["teacher"]["name"] == "teacher"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `teacher` |" in card and "| `alpha` | 1.0 |" in card
    before, teacher, after = (
        NVEmbedModel.from_pretrained(tmp_path / name).encode(SENTENCES) for name in ("student", "teacher", "out")
    )
    if "similarities" not in options:  # any rotation of the teacher's embeddings has its similarities
        towards = [F.cosine_similarity(x, teacher).mean().item() for x in (before, after)]
        assert towards[1] > towards[0]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["states", "similarities"])
def test_two_processes_distil_as_one(student, teacher_dir, triplets_file, tmp_path, part):
    student.save_pretrained(tmp_path / "student")
    options = ["--kd_losses", part, "scores", "--in_batch_negatives", "true"]
    run = partial(preloaded.run, processes=2)
    one = distil(tmp_path / "student", teacher_dir, triplets_file, tmp_path / "one", *options)
    two = distil(tmp_path / "student", teacher_dir, triplets_file, tmp_path / "two", *options, run=run, rows=4)
    for name in ("loss", "kd/scores", f"kd/{part}"):
        losses = [[entry[name] for entry in log if name in entry] for log in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", ["true", "false"])
def test_shards_of_a_pruned_student_keep_its_zeros(student, teacher_dir, triplets_file, tmp_path, use_peft):
    """Under FSDP2, in chunks, which the processes have different numbers of: as one process with the whole batch."""
    pattern = Pattern.parse("2:4")
    for module in decoder_matrices(student.embedding_model).values():
        module.weight.data.masked_fill_(pattern.lowest(module.weight.abs()), 0)
    student.config.pruning = {"method": "magnitude", "pattern": "2:4", "sparsity": 0.5}
    student.save_pretrained(tmp_path / "student")
    options = ["--kd_losses", "states", "scores", "--use_peft", use_peft, "--max_steps", "3", "--logging_steps", "1"]
    one = distil(tmp_path / "student", teacher_dir, triplets_file, tmp_path / "one", *options)
    two = distil(
        tmp_path / "student", teacher_dir, triplets_file, tmp_path / "two", *options, "--chunk_tokens", "40",
        run=preloaded.run_sharded, rows=4,
    )  # fmt: skip
    losses = [[entry["kd/scores"] for entry in log if "kd/scores" in entry] for log in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    trained = NVEmbedModel.from_pretrained(tmp_path / "two")
    for name, module in decoder_matrices(trained.embedding_model).items():
        before = student.embedding_model.get_submodule(name).weight
        assert pattern.holds(module.weight) and not torch.equal(module.weight, before)
