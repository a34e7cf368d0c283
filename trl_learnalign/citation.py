"""How to cite the method, and what it is called."""

ARXIV = "2506.11480"

TITLE = "LearnAlign: Data Selection for LLM Reinforcement Learning with Improved Gradient Alignment"

BIBTEX = f"""@inproceedings{{li2026learnalign,
  title     = {{{TITLE}}},
  author    = {{Li and others}},
  booktitle = {{Findings of the Association for Computational Linguistics: ACL 2026}},
  year      = {{2026}},
  url       = {{https://arxiv.org/abs/{ARXIV}}}
}}"""
