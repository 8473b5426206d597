import json
import subprocess
import sys
from pathlib import Path

import pytest

from nvembed.train.quickstart import run


def test_a_wrong_download_is_refused(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(run.HfApi, "model_info", unreachable)
    (tmp_path / run.GGUF).parent.mkdir()
    (tmp_path / run.GGUF).write_bytes(b"not the model")
    with pytest.raises(ValueError, match="has SHA-256 .* expected b179c9"):
        run.fetch_base(tmp_path)


@pytest.mark.slow
def test_answers_come_from_the_checkpoint_alone(tmp_path, checkpoint, sentences):
    rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(sentences)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = Path(run.__file__).with_name("answers.py")
    command = [sys.executable, "-I", script, checkpoint, tmp_path, sentences[2], "Another question?"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line for line in output if line and not line.startswith(" ")] == [sentences[2], "Another question?"]
    assert sum(line.startswith("  ") for line in output) == 6


def test_table():
    scores = {"before": {"nDCG@10": 1.0, "V-measure": 22.22}, "after": {"nDCG@10": 33.33, "V-measure": 4.0}}
    lines = run.table(scores).splitlines()
    assert [line.split() for line in lines] == [
        ["nDCG@10", "V-measure"],
        ["before", "1.0", "22.2"],
        ["after", "33.3", "4.0"],
    ]
