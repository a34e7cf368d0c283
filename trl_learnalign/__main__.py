"""`python -m trl_learnalign`, and `accelerate launch --module trl_learnalign`."""

from trl_learnalign.cli import main

main()
