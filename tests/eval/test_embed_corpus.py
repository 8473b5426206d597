"""The script on one process, on two, killed and run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import faiss
import numpy as np
import pytest

from nvembed import NVEmbedModel
from nvembed.eval.embed_corpus import EmbedArguments, run
from nvembed.eval.files import claimed
from nvembed.eval.vectors import VectorShards


@pytest.fixture
def corpus(tmp_path, sentences):
    rows = [{"_id": f"d{i}", "title": "", "text": f"{sentences[i % 8]} {i}"} for i in range(20)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(checkpoint, corpus, folder, **options):
    options = {"max_length": 64, "shard_rows": 6} | options
    return EmbedArguments(model=str(checkpoint), output_dir=str(folder), corpus=str(corpus), **options)


def test_vectors_are_those_of_encode_in_the_order_of_the_corpus(checkpoint, corpus, tmp_path):
    index = tmp_path / "index.faiss"
    vectors = run(arguments(checkpoint, corpus, tmp_path / "v", to_faiss=str(index)))
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = NVEmbedModel.from_pretrained(checkpoint).encode(texts, "", 64).numpy()
    found = np.concatenate(list(vectors.blocks()))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert list(vectors.ids()) == [f"d{i}" for i in range(20)]
    _, positions = faiss.read_index(str(index)).search(expected[:3], 1)
    assert positions.ravel().tolist() == [0, 1, 2]
    assert not (tmp_path / "v" / "texts").exists()


def test_a_finished_folder_takes_the_same_corpus_only(checkpoint, corpus, tmp_path):
    run(arguments(checkpoint, corpus, tmp_path / "v"))
    before = (tmp_path / "v" / "00000" / "vectors.npy").stat().st_mtime_ns
    run(arguments(checkpoint, corpus, tmp_path / "v"))
    assert (tmp_path / "v" / "00000" / "vectors.npy").stat().st_mtime_ns == before
    with claimed(tmp_path / "v", "x"), pytest.raises(ValueError, match="another embed_corpus.py runs in"):
        run(arguments(checkpoint, corpus, tmp_path / "v"))
    with pytest.raises(ValueError, match="with shard_rows 6, this run has 7"):
        run(arguments(checkpoint, corpus, tmp_path / "v", shard_rows=7))
    shutil.rmtree(tmp_path / "v" / "00001")
    again = run(arguments(checkpoint, corpus, tmp_path / "v"))
    assert (again.rows, (tmp_path / "v" / "00000" / "vectors.npy").stat().st_mtime_ns) == (20, before), "one made again"
    shutil.rmtree(tmp_path / "v" / "00001")
    with corpus.open("a") as file:
        file.write(json.dumps({"_id": "new", "text": "one more"}) + "\n")
    with pytest.raises(ValueError, match="holds vectors of another corpus"):
        run(arguments(checkpoint, corpus, tmp_path / "v"))


def test_bad_options_are_named(checkpoint, corpus, tmp_path):
    with pytest.raises(ValueError, match="tasks is 0"):
        arguments(checkpoint, corpus, tmp_path, tasks=0)
    with pytest.raises(ValueError, match="shard_rows is 0"):
        arguments(checkpoint, corpus, tmp_path, shard_rows=0)
    with pytest.raises(ValueError, match="executor_options is 'none.yaml', which is not a file"):
        arguments(checkpoint, corpus, tmp_path, executor_options="none.yaml")
    options = tmp_path / "slurm.yaml"
    options.write_text("partition: gpu\n")
    args = arguments(checkpoint, corpus, tmp_path / "v", executor="slurm", executor_options=str(options))
    with pytest.raises(ValueError, match="executor slurm with .* missing 1 required positional argument: 'time'"):
        run(args)


def test_an_instruction_that_a_model_does_not_read_is_refused(baseline, corpus, tmp_path):
    args = arguments(baseline, corpus, tmp_path / "v", instruction="Retrieve similar text")
    with pytest.raises(ValueError, match="which .*model would not read: .* own prompts.*--instruct"):
        run(args)
    args.instruct = True
    assert run(args).rows == 20


@pytest.mark.slow
def test_two_tasks_killed_and_restarted_give_the_same_vectors(checkpoint, corpus, tmp_path):
    expected = run(arguments(checkpoint, corpus, tmp_path / "one"))
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "nvembed.eval.embed_corpus", "--model", checkpoint, "--corpus", corpus]
    command += ["--output_dir", folder, "--max_length", "64", "--shard_rows", "6", "--tasks", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(folder.glob("0000?")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: (path / "vectors.npy").stat().st_mtime_ns for path in folder.glob("0000?")}
    assert done
    subprocess.run(command, check=True, capture_output=True)
    vectors = VectorShards(folder)
    for name, time_ in done.items():
        assert (folder / name / "vectors.npy").stat().st_mtime_ns == time_, "not made again"
    np.testing.assert_allclose(
        np.concatenate(list(vectors.blocks())), np.concatenate(list(expected.blocks())), atol=1e-6
    )
    assert list(vectors.ids()) == list(expected.ids())
