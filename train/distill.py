"""Retrains a student by a teacher: the contrastive loss of stage 2 + alpha * what the student lacks (Appendix A).

accelerate launch train/distill.py --config compress --model_name_or_path runs/pruned --teacher runs/stage2
"""

from nvembed.train.distill_arguments import DistillArguments
from nvembed.train.run_stage import main


if __name__ == "__main__":
    main(DistillArguments)
