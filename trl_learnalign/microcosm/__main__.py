"""``python -m trl_learnalign.microcosm FOLDER`` makes the base model."""

from .base_model import main

main()
