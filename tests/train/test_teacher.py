"""Teachers: what they read, what they refuse, and the cache of their embeddings."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch

from nvembed.eval.files import write_json
from nvembed.eval.models import load_model
from nvembed.texts_nvembed import format_instruction
from nvembed.train import teacher as teacher_module
from nvembed.train.collator import BatchText, TripletCollator
from nvembed.train.data.blend import Blend
from nvembed.train.data.source import DatasetSource
from nvembed.train.teacher import EmbeddingTeacher, StatesTeacher, TeacherCache, cache_id, texts_of_run
from tests.conftest import SENTENCES, randomize
from tests.triplets import prepare, write_jsonl


@pytest.fixture
def teacher(teacher_dir) -> EmbeddingTeacher:
    return EmbeddingTeacher(load_model(str(teacher_dir), max_length=32))


@pytest.fixture
def blend(triplets_file) -> Blend:
    return Blend([prepare([DatasetSource(triplets_file, instruction="Find it")], 1)], 8)


@pytest.fixture
def collator(student) -> TripletCollator:
    return TripletCollator(student.tokenizer, student.config, 32, 1)


def test_a_teacher_reads_its_own_prompts_or_instructions(teacher_dir):
    query, passage = BatchText("", "a", True), BatchText("", "b", False)
    symmetric = BatchText("Instruct: Compare\nQuery: ", "b", False)
    prompted = replace(load_model(str(teacher_dir)), prompts={"query": "Q: ", "document": "D: ", "default": ""})
    assert [EmbeddingTeacher(prompted).prefix(text) for text in (query, passage, symmetric)] == ["Q: ", "D: ", "D: "]
    instructed = load_model(str(teacher_dir))
    assert [EmbeddingTeacher(instructed).prefix(t) for t in (query, passage, symmetric)] == [
        "",
        "",
        symmetric.instruction,
    ]
    of_its_own = EmbeddingTeacher(instructed, "Search")
    expected = ["Instruct: Search\nQuery: ", "", "Instruct: Search\nQuery: "]
    assert [of_its_own.prefix(text) for text in (query, passage, symmetric)] == expected


def test_teachers_without_a_common_measure_are_refused(student, teacher_dir, tmp_path):
    student.config.add_eos = not student.config.add_eos
    with pytest.raises(ValueError, match="reads texts as other tokens"):
        StatesTeacher(str(teacher_dir), None, student)
    student.config.add_eos = not student.config.add_eos
    student.config.text_config.hidden_size = 16
    with pytest.raises(ValueError, match="are 32 wide and the student's 16"):
        StatesTeacher(str(teacher_dir), None, student)


def test_a_cache_holds_what_the_teacher_gives_and_knows_whose_it_is(
    student, teacher_dir, teacher, blend, collator, batch, tmp_path
):
    folder = tmp_path / "cache"
    expected = teacher.embed(batch)
    teacher.cache = TeacherCache(folder, teacher.settings)
    teacher.cache.fill(teacher, texts_of_run(blend, collator))
    model, teacher.model = teacher.model, None  # not asked any more
    assert torch.allclose(teacher.embed(batch), expected, atol=1e-6)
    TeacherCache(folder, teacher.cache.settings).fill(teacher, texts_of_run(blend, collator))
    batch["texts"][0] = BatchText("", "a text that is nowhere", True)
    with pytest.raises(ValueError, match="cache on .* has no 'a text that is nowhere': it must be on a disk that all"):
        teacher.embed(batch)
    elsewhere = TeacherCache(tmp_path / "of another machine", teacher.cache.settings)
    with pytest.raises(ValueError, match="of another machine on .* has no"):
        elsewhere.look_up(batch["texts"])
    with pytest.raises(ValueError, match="was made with instruction"):
        TeacherCache(folder, EmbeddingTeacher(model, "Look for it").settings)
    randomize(student, seed=3)
    teacher_dir.rename(tmp_path / "before")
    student.save_pretrained(teacher_dir)
    other = EmbeddingTeacher(load_model(str(teacher_dir), max_length=32)).settings
    with pytest.raises(ValueError, match="was made with revision"):
        TeacherCache(folder, other)
    (folder / "made_from.json").unlink()
    with pytest.raises(ValueError, match=r"cache/\w{16} was made with revision"):
        TeacherCache(folder, other)


def test_a_cache_serves_later_runs_which_add_what_it_lacks(
    teacher, blend, collator, triplets_file, tmp_path, monkeypatch
):
    both = Blend([prepare([DatasetSource(triplets_file, instruction=name)], 1) for name in ("Find it", "Another")], 8)
    folder = tmp_path / "cache"
    cache = TeacherCache(folder, teacher.settings)
    cache.fill(teacher, texts_of_run(blend, collator))
    (part,) = (path for path in folder.iterdir() if path.is_dir())
    ids, layout = set(cache.ids), tmp_path / "older"  # which had one run's shards and no folder for them
    shutil.copytree(part, layout)
    write_json(layout / "made_from.json", asdict(cache.parts[0].made_from))
    assert set(TeacherCache(layout, teacher.settings).ids) == ids

    monkeypatch.setattr(teacher_module, "SHARD_ROWS", 3)
    embedded, embed = [], teacher.embed_texts

    def stop_in_the_second_part(texts):
        embedded.append(texts)
        if len(embedded) == 2:
            raise KeyboardInterrupt
        return embed(texts)

    monkeypatch.setattr(teacher, "embed_texts", stop_in_the_second_part)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(teacher, texts_of_run(both, collator))
    cache = TeacherCache(folder, teacher.settings)
    assert set(cache.ids) == ids | set(map(cache_id, embedded[0])) and len(embedded[0]) == 3
    cache.fill(teacher, texts_of_run(both, collator))
    new = [text for texts in (embedded[0], *embedded[2:]) for text in texts]
    assert {text.instruction for text in new if text.is_query} == {format_instruction("Another")}
    assert len(cache.ids) == len(ids) + len(new) == len(set(cache.ids))

    batch = collator([row for table in both.tables for row in table.select(range(2))])
    expected = EmbeddingTeacher(teacher.model).embed(batch)
    teacher.cache = cache
    assert torch.allclose(teacher.embed(batch), expected, atol=1e-6)


def test_runs_that_fill_a_cache_at_once_embed_each_text_once(teacher, blend, collator, tmp_path, monkeypatch):
    texts = list(texts_of_run(blend, collator))
    embedded, embed, both = [], teacher.embed_texts, threading.Barrier(2, timeout=60)

    def count(part):
        embedded.extend(part)
        return embed(part)

    def run(texts):
        cache = TeacherCache(tmp_path / "cache", teacher.settings)
        both.wait()  # until both have opened it, empty
        cache.fill(teacher, texts)
        assert set(map(cache_id, texts)) <= set(cache.ids)

    monkeypatch.setattr(teacher, "embed_texts", count)
    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(run, texts[:-2]), pool.submit(run, texts[2:])]:
            result.result()
    assert len(embedded) == len({cache_id(text) for text in texts})


def test_a_cache_has_every_text_that_any_batch_asks_for(student, teacher, tmp_path):
    """With surplus negatives that move up where others are left out, and texts on both sides of a symmetric set."""
    rows = [
        {
            "query": text, "positive": SENTENCES[i - 1], "negatives": [SENTENCES[i - 2], SENTENCES[i - 3]],
            "positive_score": 0.5, "negative_scores": [0.9, 0.1],
        }
        for i, text in enumerate(SENTENCES)
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "scored.jsonl", rows)
    blend = Blend([prepare([DatasetSource(path, instruction="Find it", symmetric=True)], 2)], 8)
    collator = TripletCollator(student.tokenizer, student.config, 32, 1, false_negative_margin=0.1)
    cache = TeacherCache(tmp_path / "cache", teacher.settings)
    cache.fill(teacher, texts_of_run(blend, collator))
    batches = [collator([blend[i], blend[j]]) for i in range(8) for j in range(8) if i != j]
    expected = [teacher.embed(batch) for batch in batches[:3]]
    teacher.cache = cache
    found = [teacher.embed(batch) for batch in batches]
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(expected, found))
