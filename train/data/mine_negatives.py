"""Mines negatives once and writes any training dataset as ready triplets.

python train/data/mine_negatives.py --path DATASET --output triplets.jsonl [--kind retrieval] [--num_negatives 7]
"""

import argparse
from pathlib import Path

from nvembed.train.data.prepared import OPEN, iterate_triplets, leave_instruction_open, write_jsonl
from nvembed.train.data.source import DatasetSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="dataset: local file or folder, or Hub name")
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--kind", help="see nvembed.train.data.kinds.KINDS; inferred if left out")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--instruction", help="task definition to store with every triplet; rows keep their own if left out"
    )
    parser.add_argument("--num_negatives", type=int, default=7)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = DatasetSource(args.path, args.kind, args.split, args.instruction, samples=args.samples)
    triplets = iterate_triplets(source, args.num_negatives, args.seed, OPEN)
    count = write_jsonl(Path(args.output), map(leave_instruction_open, triplets))
    print(f"{count} triplets in {args.output}")


if __name__ == "__main__":
    main()
