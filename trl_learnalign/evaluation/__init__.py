"""Accuracy on held-out problems and benchmarks."""

from trl_learnalign.evaluation.held_out import held_out_accuracy

__all__ = ["held_out_accuracy"]
