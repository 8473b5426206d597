"""Runs a script and writes its peak memory, in GB: python eval/speed/measured.py peak.json script.py --its arguments"""

import atexit
import json
import runpy
import sys
from pathlib import Path

import torch

from nvembed.eval.peak_memory import peak_memory


def report(path: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    path.write_text(json.dumps({"peak_gb": peak_memory(device)}))


if __name__ == "__main__":
    path = Path(sys.argv[1])
    sys.argv = sys.argv[2:]
    atexit.register(report, path)
    runpy.run_path(sys.argv[0], run_name="__main__")
