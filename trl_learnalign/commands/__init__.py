"""The commands of `trl-learnalign`: one module each, with `main(arguments)`."""
