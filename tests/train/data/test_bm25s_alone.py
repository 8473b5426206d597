"""bm25s is kept from jax, which would take a GPU's memory and break ties its own way."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "import bm25s", "import jax"])
def test_jax_is_not_used(tmp_path, before):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("")
    (tmp_path / "jax" / "lax.py").write_text("def top_k(scores, k): print('took the GPU')\n")
    script = f"""
import sys
{before}
import nvembed.train.data.bm25s_alone
import bm25s.selection
assert not bm25s.selection.JAX_IS_AVAILABLE
import jax.lax  # of use to others still
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert ("took the GPU" in result.stdout) == (before == "import bm25s"), "or else the stand-in is never met"


def test_nothing_else_imports_bm25s():
    importing = re.compile(r"^\s*(import|from) bm25s\b", re.MULTILINE)
    folders = (ROOT / "train", ROOT / "eval", ROOT / "serve")
    found = {path.name for folder in folders for path in folder.rglob("*.py") if importing.search(path.read_text())}
    assert found == {"bm25s_alone.py"}
