"""The only room with private names of TRL, transformers, accelerate and DeepSpeed.

What it borrows from a `GRPOTrainer` it gives back: every context manager here restores what it changed, also after an
exception. Each file lists the names that it requires, and `check_trainer` proves at attach time that they exist, so
that an unsupported version is an error with a remedy instead of a wrong result.
"""
