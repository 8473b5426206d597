"""Stage 2: retrieval and non-retrieval data blended in every batch, hard negatives only (paper section 3.3).

accelerate launch train/stage2.py --config train/recipes/quickstart-stage2.yaml --output_dir runs/stage2
"""

from nvembed.train.arguments import Stage2Arguments
from nvembed.train.run_stage import main


if __name__ == "__main__":
    main(Stage2Arguments)
