"""Tests for tests/gpu.py: what fails or hangs on a lent machine costs its own step alone."""

import os
import time
from pathlib import Path

from tests import gpu


FORK = """
import pathlib, subprocess
child = subprocess.Popen(["sleep", "60"])
pathlib.Path({}).write_text(str(child.pid))
child.wait()
"""


def is_running(process: int) -> bool:
    """Whether a process runs; one that ended and whose parent has not asked for it does not."""
    try:
        return Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_steps_fail_alone_and_a_hanging_one_is_killed_with_its_children(tmp_path, monkeypatch, capsys):
    pid = tmp_path / "pid"
    steps = {
        "fails": gpu.Step(["-c", "raise SystemExit(3)"], 60),
        "hangs": gpu.Step(["-c", FORK.format(repr(str(pid)))], 3),
        "works": gpu.Step(["-c", "print('here')"], 60),
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.run(list(steps), tmp_path, dict(os.environ), time.monotonic() + 600) == 2
    summary = capsys.readouterr().out.splitlines()[-3:]
    assert [line.partition(",")[0] for line in summary] == [
        "fails: exit code 3", "hangs: stopped after 3 s", "works: done"
    ]  # fmt: skip
    assert (tmp_path / "works.log").read_text() == "here\n"
    deadline = time.monotonic() + 10
    while is_running(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(pid.read_text()))


def test_without_time_left_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STEPS", {"works": gpu.Step(["-c", ""], 60)})
    assert gpu.run(["works"], tmp_path, dict(os.environ), time.monotonic() + 5) == 1
    assert not (tmp_path / "works.log").exists()
