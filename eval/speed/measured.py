"""Runs a script and prints its peak memory last, in GB: python eval/speed/measured.py script.py --its arguments"""

import atexit
import json
import runpy
import sys

import torch

from nvembed.eval.speed.encode import peak_memory


@atexit.register
def report() -> None:
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    print(json.dumps({"peak_gb": peak_memory(device)}), flush=True)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
