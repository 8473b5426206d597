"""Stage 1: contrastive instruction tuning on retrieval data, in-batch and hard negatives (paper section 3.3).

accelerate launch train/stage1.py --config train/recipes/quickstart-stage1.yaml --output_dir runs/stage1
"""

from nvembed.train.arguments import Stage1Arguments
from nvembed.train.run_stage import main


if __name__ == "__main__":
    main(Stage1Arguments)
