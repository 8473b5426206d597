"""The processes that tests start: their output, their failures, and what is too late to set."""

import subprocess
from pathlib import Path

import pytest

from tests import preloaded


pytestmark = pytest.mark.slow  # the first process waits for all imports


@pytest.fixture
def write(tmp_path):
    """Writes a script."""

    def write(*lines: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text("import atexit, os, subprocess, sys, time\n" + "\n".join(lines))
        return path

    return write


def test_a_script_gets_its_arguments_and_environment_and_runs_to_its_end(write, monkeypatch):
    script = write(
        "assert 'nvembed.train.run_stage' in sys.modules, 'not preloaded'",
        "atexit.register(print, 'ended')",
        "print(*sys.argv[1:], os.environ.get('MINE'))",
    )
    done = preloaded.run(script, "a", 1, env={"MINE": "set"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "a 1 set\nended\n", "")
    monkeypatch.setenv("MINE", "changed")
    assert preloaded.run(script).stdout == "changed\nended\n"
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE would change nothing"):
        preloaded.run(script, env={"HF_HUB_OFFLINE": "0"})


def test_one_of_several_that_fails_ends_all(write):
    script = write(
        "atexit.register(print, 'ended', os.environ['RANK'], flush=True)",
        "sys.exit('wrong') if os.environ['RANK'] == '1' else time.sleep(60)",
    )
    failed = preloaded.run(script, processes=2)
    assert (failed.returncode, failed.stdout, failed.stderr) == (1, "ended 1\n", "wrong\n")


def test_too_long_a_script_is_killed_with_what_it_has_started(write, tmp_path):
    script = write("subprocess.run(['sh', '-c', 'sleep 4; touch ' + sys.argv[1]])")
    with pytest.raises(subprocess.TimeoutExpired):
        preloaded.run(script, tmp_path / "late", timeout=1)
    with pytest.raises(subprocess.TimeoutExpired):
        preloaded.run(write("time.sleep(60)"), timeout=5)
    assert not (tmp_path / "late").exists()
