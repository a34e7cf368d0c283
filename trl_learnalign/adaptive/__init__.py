"""Adaptive order: a belief about every prompt's success rate, and the order of training by it.

`features` says what is known of a prompt beforehand, `probe` learns to tell success rates from that, `belief` joins
it with each prompt's own outcomes, `order` says which prompts come next, `calibration` how right the belief was. All
of it is NumPy on numbers: no model, no trainer.
"""
