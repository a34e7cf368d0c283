"""The only package that uses private names of TRL, transformers, accelerate and DeepSpeed.

Every context manager here restores the state of the `GRPOTrainer` that it changed, also after an exception. Each
module lists the names that it requires. `check_trainer` checks at attach time that they exist, so that an unsupported
version fails with a remedy instead of giving a wrong result.
"""
