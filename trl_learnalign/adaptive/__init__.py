"""Adaptive order: a posterior of every prompt's success rate, and an order of training that uses it.

`belief` holds the features of prompts, a model that predicts success rates from them, the posterior that combines its
predictions with each prompt's own outcomes, and the calibration of predictions. `order` decides which prompts come
next. Everything is NumPy on numbers: no model and no trainer is needed.
"""
