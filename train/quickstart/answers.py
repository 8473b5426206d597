"""Answers questions from a corpus with nothing but a checkpoint and transformers, without `nvembed`.

python -I train/quickstart/answers.py CHECKPOINT BEIR_FOLDER QUESTION...
"""

import json
import sys
from pathlib import Path

from transformers import AutoModel


checkpoint, folder, *questions = sys.argv[1:]
sys.modules["nvembed"] = None  # the checkpoint must stand on its own: importing the package fails from here on
model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
documents = [json.loads(line) for line in (Path(folder) / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
passages = model.encode([document["text"] for document in documents], max_length=64, show_progress_bar=True)
instruction = "Instruct: Given a summary, retrieve the documentation\nQuery: "
queries = model.encode(questions, instruction=instruction, max_length=64)
for question, scores in zip(questions, queries @ passages.T):
    print(f"\n{question}")
    for score, position in zip(*(x.tolist() for x in scores.topk(3))):
        print(f"  {score:.2f}  {documents[position]['_id']}: {documents[position]['text'][:100]}")
