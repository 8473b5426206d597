"""Texts with a class, for pictures of what a model makes of them."""

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nvembed.eval.data import tables


@dataclass
class LabelledArguments:
    """The texts to look at."""

    data: str = field(metadata={"help": "Folder with <split>.jsonl, .csv or .parquet of `text`, `label`; or a file."})
    split: str = field(default="test", metadata={"help": "Of a folder."})
    classes: list[str] | None = field(default=None, metadata={"help": "The labels to look at; None: the commonest 8."})
    samples: int = field(default=100, metadata={"help": "Texts of each class, at most."})
    instruction: str = field(default="", metadata={"help": "Task definition before every text."})
    seed: int = field(default=42, metadata={"help": "Of the choice of texts."})

    def read(self) -> list[tuple[str, str]]:
        """(Text, label), class after class, each text once.

        Raises:
            ValueError: there are no such texts, or fewer than two classes.
        """
        path = Path(self.data)
        files = tables.find_tables(path, self.split) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ValueError(f"data {self.data!r}: there is no {self.split}.jsonl, .csv or .parquet, nor such a file")
        labels: dict[str, str] = {}
        for file in files:
            for name, row in tables.read_table(file, ("text", "label")):
                label = row.get("label_text", row["label"])
                labels.setdefault(tables.text_of(row, "text", name), str(label))
        counts = Counter(labels.values())
        classes = list(dict.fromkeys(self.classes or [label for label, _ in counts.most_common(8)]))
        if unknown := [label for label in classes if label not in counts]:
            known = ", ".join(sorted(counts)[:20])
            raise ValueError(f"classes has {unknown[0]!r}, which no text has; labels are {known}")
        if len(classes) < 2:
            where = f"{self.data} has" if self.classes is None else "classes names"
            raise ValueError(f"{where} one class, {', '.join(classes)}; there is nothing to tell apart")
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}; it must be 2 or more")
        rng, chosen = random.Random(self.seed), []
        for label in sorted(classes):
            texts = [text for text, own in labels.items() if own == label and text.strip()]
            if len(texts) < 2:
                raise ValueError(f"{self.data} has {len(texts)} text of class {label!r}; each class needs two")
            chosen += [(text, label) for text in rng.sample(texts, min(self.samples, len(texts)))]
        return chosen
