"""The only folder that touches private names of TRL, transformers and DeepSpeed; each file lists those it requires."""
