"""The processes that tests start: their output, their failures, and what is too late to set."""

import subprocess

import pytest

from tests import preloaded


pytestmark = pytest.mark.slow  # the first process waits for all imports


def test_what_a_script_says_and_how_it_ends(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, sys, time\n"
        "print(sys.argv[1], os.environ.get('MINE'))\n"
        "rank = os.environ.get('RANK')\n"
        "if rank == '1': sys.exit('wrong')\n"
        "if rank == '0' or sys.argv[1] == 'sleep': time.sleep(30)\n"
        "atexit.register(print, 'ended')\n"
    )
    done = preloaded.run(script, "one", env={"MINE": "set"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "one set\nended\n", "")
    failed = preloaded.run(script, "two", processes=2)
    assert (failed.returncode, failed.stderr) == (1, "wrong\n")
    assert "ended" not in failed.stdout, "the other one was not waited for"
    with pytest.raises(subprocess.TimeoutExpired):
        preloaded.run(script, "sleep", timeout=1)
    monkeypatch.setenv("MINE", "changed")
    assert preloaded.run(script, "three").stdout.startswith("three changed")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE would change nothing"):
        preloaded.run(script, "four", env={"HF_HUB_OFFLINE": "0"})
