"""What would fail after minutes of waiting, found in seconds: no hub, no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import HFValidationError

_TIMEOUT = 10.0  # seconds for one look at the hub


def missing_from_hub(name: str, kind: str) -> str | None:
    """Why a hub repository cannot be had, or `None` if it can (or is a local path).

    Args:
        name (`str`): Hub id or path.
        kind (`str`): `"model"` or `"dataset"`.
    """
    if Path(name).exists():
        return None
    try:
        if kind == "model" and isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        api = HfApi()
        if kind == "model":
            api.model_info(name, timeout=_TIMEOUT)
        else:
            api.dataset_info(name, timeout=_TIMEOUT)
    except HFValidationError:
        return f"{kind} {name!r} is neither a path that exists nor a hub id"
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        return f"{kind} {name!r} is not in the local cache, and offline mode is on"
    except HfHubHTTPError as error:
        return (
            f"{kind} {name!r}: the hub answers {error.response.status_code if error.response is not None else error}"
        )
    except Exception as error:
        # Each version of the client wraps connection failures in other classes; whatever they are called, the hub
        # was not reached, unless a cached dataset makes that unimportant.
        return None if kind == "dataset" and _cached(name) else f"{kind} {name!r}: the hub cannot be reached ({error})"
    return None


def _cached(name: str) -> bool:
    from datasets.config import HF_DATASETS_CACHE

    return os.path.isdir(os.path.join(HF_DATASETS_CACHE, name.replace("/", "___")))


def missing_gpu(use_cpu: bool) -> str | None:
    """Why a run meant for a GPU cannot start, or `None` if one is there or the CPU was asked for."""
    if use_cpu or torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        return None
    return "no GPU is visible"
