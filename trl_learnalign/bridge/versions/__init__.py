"""Differences between releases of TRL, each in a file that is named by it.

- `fused_head`, `plain_head`: where log-probabilities come from (a fused head from trl 1.15 on, logits before).
- `generation_options`: what TRL's unwrapping for generation takes (one more option from trl 1.16 on).
- `generation_tokens`: which tokens losses are divided by (all that were generated in trl 1.8, those that count since).

Which of them holds is a matter of the release, never of which names happen to be there: a release that has lost a name
is refused, instead of taken for an older one.
"""

from trl_learnalign.bridge.versions import fused_head, plain_head, releases

head = plain_head if releases.is_before("1.15") else fused_head
"""The LM head of the installed release."""

__all__ = ["head", "releases"]
