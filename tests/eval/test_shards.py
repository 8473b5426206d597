"""Steps over shards, on this machine and through Slurm's commands, for which stand-ins run the jobs here."""

import os
import stat
import sys
from functools import partial
from pathlib import Path

import pytest

from nvembed.eval import shards
from nvembed.eval.shards import ExecutorArguments, make_shards


def write_number(number: int, path: Path, fails: int | None) -> None:
    if number == fails:
        raise ValueError(f"shard {number} is bad")
    path.write_text(str(number))


def prepare(fails: int | None = None):
    return partial(write_number, fails=fails)


def paths(folder, count=5):
    return [folder / "out" / f"{number}.txt" for number in range(count)]


@pytest.mark.parametrize("tasks", [1, 3, 9])
def test_every_shard_is_made_once_for_any_number_of_tasks(tmp_path, tasks):
    where = ExecutorArguments(tasks=tasks, workers=1)
    make_shards("numbers", prepare, paths(tmp_path), tmp_path / "logs", where)
    assert [path.read_text() for path in paths(tmp_path)] == list("01234")
    paths(tmp_path)[2].unlink()
    before = [path.stat().st_mtime_ns for path in paths(tmp_path) if path.exists()]
    make_shards("numbers", prepare, paths(tmp_path), tmp_path / "logs", where)
    assert paths(tmp_path)[2].read_text() == "2", "made again although its task was recorded as complete"
    assert [path.stat().st_mtime_ns for n, path in enumerate(paths(tmp_path)) if n != 2] == before


def test_a_failing_shard_stops_the_step_and_leaves_the_others(tmp_path):
    where = ExecutorArguments()
    with pytest.raises(ValueError, match="shard 3 is bad"):
        make_shards("numbers", partial(prepare, 3), paths(tmp_path), tmp_path / "logs", where)
    assert [path.exists() for path in paths(tmp_path)] == [True, True, True, False, False]
    make_shards("numbers", prepare, paths(tmp_path), tmp_path / "logs", where)
    assert all(path.exists() for path in paths(tmp_path))


SBATCH = """#!/bin/bash
script="${@: -1}"
number=$(ls "$QUEUE" | grep -c log)
last=$(grep -oP 'array=0-\\K\\d+' "$script" || echo 0)
cp "$script" "$QUEUE/job-$number"
touch "$QUEUE/log-$number"
( for i in $(seq 0 $last); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here RUN_OFFSET=0 bash "$QUEUE/job-$number"
  done
  rm "$QUEUE/job-$number" ) > "$QUEUE/log-$number" 2>&1 &
echo Submitted batch job $number
"""
COMMANDS = {
    "sbatch": SBATCH,
    "squeue": '#!/bin/bash\n[ -f "$QUEUE/job-${@: -1}" ] && echo "RUNNING"\nexit 0\n',
    "srun": '#!/bin/bash\nexec "${@:4}"\n',  # srun -l -n 1 command
    "scontrol": "#!/bin/bash\necho here\n",
    "merge_stats": "#!/bin/bash\n",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands: `sbatch` runs an array's tasks one after the other."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in COMMANDS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    (tmp_path / "queue").mkdir()
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # a job imports `prepare` by its name
    monkeypatch.setattr(shards, "POLL", 0.1)
    options = tmp_path / "slurm.yaml"
    options.write_text(f"time: '1:00:00'\npartition: cpu\nslurm_logs_folder: {tmp_path / 'slurm-logs'}\n")
    return ExecutorArguments(executor="slurm", tasks=2, executor_options=str(options))


@pytest.mark.slow
def test_slurm(tmp_path, slurm):
    make_shards("numbers", prepare, paths(tmp_path), tmp_path / "logs", slurm)
    assert [path.read_text() for path in paths(tmp_path)] == list("01234")


@pytest.mark.slow
def test_a_slurm_job_that_fails_is_reported_with_its_logs(tmp_path, slurm):
    with pytest.raises(
        RuntimeError, match=r"numbers: 1 of 5 shards were not made, the first is .*4.txt; the reason is in"
    ):
        make_shards("numbers", partial(prepare, 4), paths(tmp_path), tmp_path / "logs", slurm)
    assert "shard 4 is bad" in (tmp_path / "logs" / "numbers-2" / "logs" / "task_00000.log").read_text()
