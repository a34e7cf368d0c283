"""The hooks of axolotl's plugins, 0.19 to 0.21, by their signatures, and its settings, by how they read.

`test_axolotl.py` holds them against axolotl itself where it is installed.
"""

from __future__ import annotations

import importlib
import types
from typing import Any


class BasePlugin:
    """axolotl.integrations.base.BasePlugin: what is not overridden does nothing."""

    def __init__(self):
        pass

    def register(self, cfg: dict): ...

    def get_input_args(self) -> str | None: ...

    def get_training_args_mixin(self) -> str | None: ...

    def pre_model_load(self, cfg: Any): ...

    def get_trainer_cls(self, cfg: Any): ...

    def get_training_args(self, cfg: Any): ...

    def post_trainer_create(self, cfg: Any, trainer: Any): ...

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list:
        return []

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list:
        return []

    def post_train(self, cfg: Any, model: Any): ...

    def post_train_unload(self, cfg: Any): ...


class Settings(dict):
    """As axolotl's DictDefault: names are attributes, and one that is not there is `None`."""

    def __missing__(self, name: str) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        value = self[name]
        return Settings(value) if isinstance(value, dict) else value


def load_plugin(name: str) -> BasePlugin:
    """From the YAML file's "module.Class", as axolotl does."""
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)()


def modules() -> dict[str, types.ModuleType]:
    """What stands for axolotl in `sys.modules`."""
    names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
    made = {name: types.ModuleType(name) for name in names}
    made["axolotl.integrations.base"].BasePlugin = BasePlugin
    return made
