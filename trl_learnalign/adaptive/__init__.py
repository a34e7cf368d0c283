"""Continual selection: a belief about every prompt's success rate, and the order of training that follows from it.

`neighbours` says which prompts are alike, `belief` what is believed of each from all outcomes so far, `order` which
prompts come next, `calibration` how right the belief was. All of it is NumPy on numbers: no model, no trainer.
"""
