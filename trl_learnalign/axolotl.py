"""Plugins for axolotl that add the callback to its GRPO runs.

```yaml
rl: grpo
plugins:
  - trl_learnalign.axolotl.LearnAlignPlugin
learnalign:  # settings of LearnAlignConfig; without the section, the paper's
  stages: [1000]
```

`AdaptiveOrderPlugin` trains in adaptive order instead; settings in its section override `LearnAlignConfig.adaptive()`.

Only axolotl imports this file; its plugin base class and pydantic are installed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from typing_extensions import override

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.config.fields import did_you_mean
from trl_learnalign.training.callback import AdaptiveOrderCallback, LearnAlignCallback

if TYPE_CHECKING:
    from trl import GRPOTrainer


class LearnAlignArgs(BaseModel):
    """Settings that axolotl accepts in its YAML file in addition to its own.

    Args:
        learnalign (`dict`, *optional*): Settings of [`LearnAlignConfig`] by name.
    """

    learnalign: dict[str, Any] | None = None


class LearnAlignPlugin(BasePlugin):
    """Adds a [`LearnAlignCallback`] to axolotl's GRPO trainer."""

    @override
    def get_input_args(self) -> str:
        return f"{__name__}.{LearnAlignArgs.__name__}"

    @override
    def add_callbacks_post_trainer(
        self, cfg: Any, trainer: GRPOTrainer
    ) -> list[LearnAlignCallback]:
        check_rollouts(cfg)
        return [self.callback(trainer, cfg.learnalign)]

    @staticmethod
    def callback(trainer: GRPOTrainer, section: Mapping[str, Any] | None) -> LearnAlignCallback:
        """The callback with the settings of the YAML file's section."""
        return LearnAlignCallback(trainer, LearnAlignConfig(**checked(section)))


class AdaptiveOrderPlugin(LearnAlignPlugin):
    """Adds an [`AdaptiveOrderCallback`] to axolotl's GRPO trainer."""

    @staticmethod
    @override
    def callback(trainer: GRPOTrainer, section: Mapping[str, Any] | None) -> LearnAlignCallback:
        return AdaptiveOrderCallback(trainer, LearnAlignConfig.adaptive(**checked(section)))


def check_rollouts(cfg: Any) -> None:
    """Check that rollouts are generated on-policy during training, with prompts from TRL's own data loading.

    Args:
        cfg: axolotl's settings; a missing setting is `None`.

    Raises:
        `ValueError`: If not, naming the setting.
    """
    for name in ("async_prefetch", "use_data_producer"):
        if cfg.trl and cfg.trl[name]:
            raise ValueError(
                f"trl: {name}: true generates rollouts in advance, of prompts that are not selected yet: remove it."
            )
    if (cfg.context_parallel_size or 1) > 1:
        raise ValueError(
            f"context_parallel_size: {cfg.context_parallel_size} loads prompts and generates rollouts in axolotl's "
            "own way, for groups of processes: leave it at 1."
        )


def checked(section: Mapping[str, Any] | None) -> dict[str, Any]:
    """The validated settings of the section `learnalign` in the YAML file, by name.

    Args:
        section (mapping, *optional*): Settings by name.

    Raises:
        `ValueError`: If a setting is unknown or has an invalid value, naming it.
    """
    given = dict(section or {})
    names = {field.name for field in fields(LearnAlignConfig)}
    for name in given:
        if name not in names:
            raise ValueError(f"learnalign: {name!r} is not a setting{did_you_mean(name, names)}")
    return given
