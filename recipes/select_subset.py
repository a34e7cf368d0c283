"""Warm-up, scoring and selection without the training: a subset of a dataset for any trainer.

    accelerate launch recipes/select_subset.py                                  # N = 100 to 2000 of GSM8K
    accelerate launch recipes/select_subset.py --selector random token_length ifd learnalign --top 500 1000
    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/select_subset.py

The subsets are written below <output_dir>/subsets; train on one with
`recipes/train_subset.py --subset <output_dir>/subsets/learnalign/top_1000`. Every field of the YAML file can be
overridden on the command line. The same as `trl-learnalign select`.
"""

import sys
from pathlib import Path

from trl_learnalign.cli import select

if __name__ == "__main__":
    select.main(sys.argv[1:], Path(__file__).parent / "configs" / "select_gsm8k.yaml")
