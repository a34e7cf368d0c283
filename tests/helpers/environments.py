"""Environments for models that know no tools."""

import pytest
import transformers
from packaging.version import Version


class Room:
    """An environment with a tool; it counts how often a rollout began in it."""

    def __init__(self):
        self.resets = 0

    def reset(self, **_):
        self.resets += 1

    def look(self) -> str:
        """Look around."""
        return "a door"


def pretend_to_call_tools(monkeypatch):
    """Let TRL take the tiny models' chat template for one that can call tools; they never do."""
    if Version(transformers.__version__) < Version("5.2"):
        pytest.skip("TRL has environments with transformers 5.2 and later")
    grpo_trainer = "trl.trainer.grpo_trainer."
    monkeypatch.setattr(grpo_trainer + "supports_tool_calling", lambda *_: True)
    monkeypatch.setattr(grpo_trainer + "is_chat_template_prefix_preserving", lambda *_: True)
    monkeypatch.setattr(grpo_trainer + "add_response_schema", lambda tokenizer, *_, **__: tokenizer)
    monkeypatch.setattr(
        grpo_trainer + "parse_response",
        lambda tokenizer, ids, *_, **__: {"role": "assistant", "content": tokenizer.decode(ids)},
    )
