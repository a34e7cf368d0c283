"""Accuracy of a model on the paper's benchmarks, or on a file of questions, graded as in training.

    python recipes/evaluate.py --model_name_or_path outputs/gsm8k_staged --benchmarks gsm8k math500 --use_vllm true
    python recipes/evaluate.py --model_name_or_path FOLDER --benchmarks test.jsonl --use_cpu true --eval_samples 40
    python recipes/evaluate.py --model_name_or_path FOLDER --harness hendrycks_math500

The same as `trl-learnalign evaluate`; `--help` lists all options.
"""

import sys

from trl_learnalign.cli import evaluate

if __name__ == "__main__":
    evaluate.main(sys.argv[1:], prog="evaluate.py")
