"""Names of all files, and values as JSON: plain and without secrets, and the base class of what is written.

```
output_dir/
  summary.json  report.html  README.md
  checkpoint-N/   learnalign_complete.json  learnalign_record.json  learnalign_history.parquet
                  learnalign_state.safetensors  learnalign_features.safetensors
                  learnalign_reference.safetensors  learnalign_generation_R.safetensors
  subsets/        correlations.csv  overlaps.csv
    SELECTOR/     scores.parquet  top_N/  top_N.parquet  top_N.jsonl
  _learnalign/    run.json  run.lock  log_history.json  reward_history.parquet  categories.parquet
                  initial_weights.safetensors  initial_reference.safetensors
                  stage_K.parquet  stage_K_examples.json  stage_K_selected.parquet  figures/
    stage_K/      one folder per measure: manifest.json, checks.json and its shards
      round_R/    with a rollout budget: prompts.json, and the same folders for each round
```
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    pass

# ---- General --------------------------------------------------------------------------------------------------------

TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
"""Name of a file that is being written, with the id of the writing process."""

TEMPORARY_AMONG_OTHERS = re.compile(
    r"\.(learnalign_.+|report\.html|README\.md|(summary|settings)\.json|records\.jsonl|trial)\.\d+\.tmp"
)
"""The same in folders shared with other software: output folders, checkpoints, evaluations."""


def temporary(name: str, process: int) -> str:
    """Temporary name of a file that is being written.

    Args:
        name (`str`): Its final name.
        process (`int`): Id of the process that writes it.
    """
    return f".{name}.{process}.tmp"


# ---- The output folder ----------------------------------------------------------------------------------------------

RECORDS = "_learnalign"
"""The record folder inside the output folder, unless `LearnAlignConfig.record_dir` names another.

With `push_to_hub=True` transformers uploads the output folder except for what begins with `_`, so prompts, rollouts
and features are not uploaded.
"""

SUMMARY = "summary.json"
"""Summary of a recipe in its output folder, and of an evaluation in its folder."""

REPORT = "report.html"
MODEL_CARD = "README.md"
DATASET_CARD = "README.md"  # of a published selection

REMEDY = (
    "move it away, or resume from the last checkpoint (also of a finished run), which restores it"
)
"""Remedy for a damaged file of the record folder whose contents are also in a checkpoint."""

# ---- The record folder ----------------------------------------------------------------------------------------------

RUN = "run.json"
LOCK = "run.lock"
LOG = "log_history.json"
HISTORY = "reward_history.parquet"
CATEGORIES = "categories.parquet"
PROMPT_FEATURES = "prompt_features.safetensors"
FIGURES = "figures"
INITIAL_WEIGHTS = "initial_weights.safetensors"
INITIAL_REFERENCE = "initial_reference.safetensors"


def record_folder(output_dir: str | Path) -> Path:
    """Default folder of a run's records, used unless `record_dir` is given."""
    return Path(output_dir) / RECORDS


def output_folder(records: str | Path) -> Path:
    """The output folder of a record folder: its parent, or the folder itself if `record_dir` was set explicitly."""
    folder = Path(records)
    return folder.parent if folder.name == RECORDS else folder


PHASE_NAME = re.compile(r"warmup|stage_[1-9][0-9]{0,8}")
"""Valid phase names of a plan; file and folder names are derived from them."""


def inside(folder: Path, *names: str) -> Path:
    """Path of a file or folder inside a record folder, which may come from an untrusted source.

    Args:
        folder (`Path`): The record folder.
        names (`str`): The path inside it.

    Raises:
        `ValueError`: If a name or a link leads outside, naming both places.
    """
    path = folder.joinpath(*names)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside {folder}, so it is neither read nor written. Copy its "
            "target into the folder if it belongs there."
        )
    return path


def stage_table(stage: str) -> str:
    """The table of a stage's candidates.

    Args:
        stage (`str`): `Phase.name`, which is also the folder of the stage's measurements.
    """
    return f"{stage}.parquet"


def stage_examples(stage: str) -> str:
    """File with example prompts of a stage and a few of their rollouts."""
    return f"{stage}_examples.json"


def stage_selected(stage: str) -> str:
    """File with the selected prompts of a stage, with all columns of the dataset."""
    return f"{stage}_selected.parquet"


# ---- Stores of measurements -----------------------------------------------------------------------------------------

MANIFEST = "manifest.json"
CHECKS = "checks.json"
"""Results of a measure's own checks."""

SHARDS = "shard-*.safetensors"
SHARD = re.compile(r"shard-(\d{5,})-([0-9a-f]{32})\.safetensors")
"""Number of a shard, and digest of its content."""

VALIDATION = "validation"
"""Folder of the validation set's measurements inside the stage folder."""


ROUND_PROMPTS = "prompts.json"
"""The prompts that a round measures, in the round's folder."""


def round_folder(number: int) -> str:
    """Folder of a round's measurements inside the stage folder; rounds are counted from 1."""
    return f"round_{number}"


def shard(number: int, digest: str) -> str:
    """File name of a shard of measurements.

    Args:
        number (`int`): Number of the shard, from 0.
        digest (`str`): Digest of its content, 32 hexadecimal digits.
    """
    return f"shard-{number:05d}-{digest}.safetensors"


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

COMPLETE = "learnalign_complete.json"
"""Marks a checkpoint as complete; it is written last."""

REFERENCE = "learnalign_reference.safetensors"
CHECKPOINT_RECORD = "learnalign_record.json"
"""The notes of `run.json` at the time of the checkpoint."""

CHECKPOINT_HISTORY = "learnalign_history.parquet"
"""The reward history at the time of the checkpoint."""

CHECKPOINT_STATE = "learnalign_state.safetensors"
"""The pools of the stages, and their scores."""

CHECKPOINT_FEATURES = "learnalign_features.safetensors"
"""Features of the prompts (embeddings)."""


def generation(rank: int) -> str:
    """File with the unfinished generation of one process."""
    return f"learnalign_generation_{rank}.safetensors"


# ---- Subsets of `trl-learnalign select` -----------------------------------------------------------------------------

SUBSETS = "subsets"
"""Folder of the subsets inside the output folder."""

SCORES = "scores.parquet"
"""All candidates of a selector, with the columns of [`stage_table`]."""

CORRELATIONS, OVERLAPS = "correlations", "overlaps"
"""Names of the tables in `subsets`, each with a column `selector` and one column per selector."""


def selector_folder(selector: str) -> str:
    """Folder name of a selector; a dotted path has a colon, which some file systems do not allow."""
    return selector.replace(":", ".")


def subset(size: int) -> str:
    """Name of a subset of this size: the folder for `datasets`, and the stem of the files next to it."""
    return f"top_{size}"


# ---- Evaluations ----------------------------------------------------------------------------------------------------

EVALUATION_SETTINGS = "settings.json"
EVALUATION_RECORDS = "records.jsonl"


# ---- Entries --------------------------------------------------------------------------------------------------------
# The keys of an entry on disk are its field names, so that each is spelled only once. Values are what JSON supports:
# numbers, strings, lists, mappings with string keys, and other entries. Missing values:
#
# - `None` is written as `null`; an optional entry (`Cost | None`) is omitted instead;
# - a field with a default may be missing on disk, any other may not;
# - keys without a field, e.g. of a later version, are kept in `others` and written back unchanged.

T = TypeVar("T")

OTHERS = "others"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Base class of entries.

    Args:
        others (mapping, *optional*): Keys on disk that have no field, with their values.

    Raises:
        `ValueError`: If a key of `others` is also a field.
    """

    open: ClassVar[bool] = False
    """Whether users may put keys into `others`; unknown keys are then no reason for a warning."""

    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for key in self.others:
            if key in hints:
                raise ValueError(
                    f"{key!r} is a reserved key of {type(self).__name__}: rename the other value."
                )


def to_json(entry: Any) -> dict[str, Any]:
    """Convert an entry to a JSON object.

    Args:
        entry (dataclass): An [`Entry`], or another dataclass of such values.
    """
    values: dict[str, Any] = {}
    for name, hint in _hints(type(entry)).items():
        value = getattr(entry, name)
        if name == OTHERS:
            values.update(value)
        elif value is not None or _entry_type(hint) is None:
            values[name] = _value_to_json(value)
    return values


def _value_to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _value_to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value_to_json(item) for item in value]
    return value


def from_json(kind: type[T], values: Any, place: str) -> T:
    """Create an entry from a JSON object.

    Args:
        kind (`type`): The dataclass.
        values (mapping): The JSON object.
        place (`str`): Its location, for messages.

    Raises:
        `ValueError`: If it is not an object, or lacks a key; names the location.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} is {values!r}, which is not an object")
    hints = _hints(kind)
    names_without_default = _names_without_default(kind)
    arguments: dict[str, Any] = {}
    rest = dict(values)
    for name, hint in hints.items():
        if name in rest and name != OTHERS:
            value = rest.pop(name)
            arguments[name] = _value_from_json(hint, value, f"{place}.{name}")
        elif name in names_without_default:
            raise ValueError(f"{place} has no {name!r}")
    if OTHERS in hints:
        arguments[OTHERS] = rest
    return kind(**arguments)


def _value_from_json(hint: Any, value: Any, place: str) -> Any:
    kind = _entry_type(hint)
    if kind is not None:
        # An empty object means `None`: it was written where nothing was measured.
        may_be_missing = kind is not hint
        return None if may_be_missing and not value else from_json(kind, value, place)
    if get_origin(hint) is tuple:
        return _items_from_json(get_args(hint)[0], value, place)
    return value


def _items_from_json(hint: Any, values: Any, place: str) -> tuple[Any, ...]:
    items = []
    for number, value in enumerate(values):
        item = _value_from_json(hint, value, f"{place}[{number}]")
        items.append(item)
    return tuple(items)


def unknown_keys(entry: Any, place: str) -> Iterator[str]:
    """Locations of the keys without a field, in an entry and its nested entries.

    Args:
        entry (dataclass): As in [`to_json`].
        place (`str`): Its location.
    """
    for name in _hints(type(entry)):
        value = getattr(entry, name)
        if dataclasses.is_dataclass(value):
            yield from unknown_keys(value, f"{place}.{name}")
    if isinstance(entry, Entry) and not entry.open:
        for key in entry.others:
            yield f"{place}.{key}"


def _hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields by name, in field order, with `others` last."""
    hints = get_type_hints(kind)
    by_name = {}
    for each in dataclasses.fields(kind):
        by_name[each.name] = hints[each.name]
    if OTHERS in by_name:
        # The base class puts it first; on disk it is last.
        by_name[OTHERS] = by_name.pop(OTHERS)
    return by_name


def _names_without_default(kind: type) -> set[str]:
    names = set()
    for each in dataclasses.fields(kind):
        if each.default is MISSING and each.default_factory is MISSING:
            names.add(each.name)
    return names


def _entry_type(hint: Any) -> type | None:
    """The dataclass of a hint `D` or `D | None`; `None` for any other hint."""
    choices = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    for choice in choices:
        if isinstance(choice, type) and dataclasses.is_dataclass(choice):
            return choice
    return None


# ---- Plain values of settings ---------------------------------------------------------------------------------------

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


_SECRETS = {
    *("token", "key", "keys", "apikey", "secret", "secrets", "auth", "authorization", "bearer"),
    *("password", "passwords", "passwd", "passphrase", "pwd", "credential", "credentials"),
}
"""Words in the names of settings that hold credentials; records and manifests are shared."""


def without_secrets(value: Any) -> Any:
    """Return a JSON value without the mapping entries that have the name of a secret.

    Numbers, booleans and `None` are kept under any name: a `pad_token_id` is no secret.

    Args:
        value: A result of [`plain`].
    """
    if isinstance(value, dict):
        return {
            name: without_secrets(entry)
            for name, entry in value.items()
            if not (_is_named_like_a_secret(name) and _has_text(entry))
        }
    if isinstance(value, list):
        return [without_secrets(entry) for entry in value]
    return value


def _is_named_like_a_secret(name: str) -> bool:
    # "HubToken" and "hub-token" are split into the same words as "hub_token"; "stop_tokens" is no secret.
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return not _SECRETS.isdisjoint(words)


def _has_text(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_text, value.values()))
    if isinstance(value, list):
        return any(map(_has_text, value))
    return isinstance(value, str)


def plain(value: Any) -> Any:
    """Return a value as JSON values; equal in all processes for equal inputs."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(entry) for entry in value]
    if callable(getattr(value, "to_dict", None)):
        return plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return _ADDRESS.sub("", str(value))
