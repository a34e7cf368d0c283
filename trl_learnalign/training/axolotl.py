"""A plugin of axolotl: the callback for its GRPO runs, told by a section `learnalign` of its YAML file.

```yaml
rl: grpo
plugins:
  - trl_learnalign.training.axolotl.LearnAlignPlugin
learnalign:  # settings of LearnAlignConfig; without the section, their defaults
  stages: [1000]
```

axolotl imports this file, and nothing else does: its base class and pydantic come with it.
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
from trl_learnalign.training.callback import LearnAlignCallback

if TYPE_CHECKING:
    from trl import GRPOTrainer


class LearnAlignArgs(BaseModel):
    """What axolotl accepts in its YAML file beside its own.

    Args:
        learnalign (`dict`, *optional*): Settings of [`LearnAlignConfig`] by name.
    """

    learnalign: dict[str, Any] | None = None


class LearnAlignPlugin(BasePlugin):
    """Gives a GRPO trainer of axolotl's the callback that decides which prompts come next."""

    @override
    def get_input_args(self) -> str:
        return f"{__name__}.{LearnAlignArgs.__name__}"

    @override
    def add_callbacks_post_trainer(
        self, cfg: Any, trainer: GRPOTrainer
    ) -> list[LearnAlignCallback]:
        check_synchronous(cfg)
        config = settings_of(cfg.learnalign)
        return [LearnAlignCallback(trainer, config)]


def check_synchronous(cfg: Any) -> None:
    """Check that rollouts are made when they are trained on.

    Args:
        cfg: axolotl's settings; one that is not there is `None`.

    Raises:
        `ValueError`: If they are made ahead, naming the setting.
    """
    for name in ("async_prefetch", "use_data_producer"):
        if cfg.trl and cfg.trl[name]:
            raise ValueError(
                f"trl: {name}: true makes rollouts ahead, of prompts that are yet to be chosen: leave it out."
            )


def settings_of(section: Mapping[str, Any] | None) -> LearnAlignConfig:
    """The settings of the YAML file's section `learnalign`.

    Args:
        section (mapping, *optional*): Settings by name.

    Raises:
        `ValueError`: If one is not known or has a bad value, naming it.
    """
    given = dict(section or {})
    names = {field.name for field in fields(LearnAlignConfig)}
    for name in given:
        if name not in names:
            raise ValueError(f"learnalign: {name!r} is no setting{did_you_mean(name, names)}")
    return LearnAlignConfig(**given)
