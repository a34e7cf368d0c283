"""Version and citation."""

__version__ = "0.1.0"


# ---- Citation -------------------------------------------------------------------------------------------------------

ARXIV = "2506.11480"

TITLE = "LearnAlign: Data Selection for LLM Reinforcement Learning with Improved Gradient Alignment"

AUTHORS = (
    "Shipeng Li",
    "Zhiqin Yang",
    "Shikun Li",
    "Xiaobo Xia",
    "Hengyu Liu",
    "Xinghua Zhang",
    "Gaode Chen",
    "Dong Fang",
    "Ying Tai",
    "Zhe Peng",
)

BOOKTITLE = "Findings of the Association for Computational Linguistics: ACL 2026"

PAGES = (40417, 40434)

URL = "https://aclanthology.org/2026.findings-acl.2009"


def _reversed(name: str) -> str:
    first_names, family = name.rsplit(" ", 1)
    return f"{family}, {first_names}"


_BETWEEN = " and\n" + 15 * " "

BIBTEX = f"""@inproceedings{{li2026learnalign,
  title     = {{{TITLE}}},
  author    = {{{_BETWEEN.join(map(_reversed, AUTHORS))}}},
  booktitle = {{{BOOKTITLE}}},
  year      = {{2026}},
  pages     = {{{PAGES[0]}--{PAGES[1]}}},
  url       = {{{URL}}}
}}"""
