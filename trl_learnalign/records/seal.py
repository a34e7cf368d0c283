"""The mark of a whole checkpoint: size and digest of each of its files, written last.

A process that dies while it saves leaves a folder without the mark. A disk that loses power may leave the mark and
files of the right size that hold nothing: so the files reach the disk before the mark is written, and their digests
are compared before a run goes on with them. XXH3 reads as fast as memory does (some 10 GB a second); it tells damage
from none, and is no protection against somebody who wants to deceive.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from trl_learnalign.records.layout import COMPLETE
from trl_learnalign.records.store import StoreError, write_json

FORMAT = 1
_BLOCK = 1 << 22
_NAME = re.compile(r"checkpoint-(\d+)")
_FOREIGN = "checkpoint-is-incomplete.txt"
"""What transformers' preemption support leaves in a folder while it saves."""


class CheckpointError(StoreError):
    """A checkpoint cannot be gone on with; the message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class FileSeal:
    """A file as it was saved.

    Args:
        size (`int`): Bytes.
        digest (`str`): XXH3 of its content, 32 hexadecimal digits.
    """

    size: int
    digest: str


@dataclass(frozen=True)
class Mark:
    """`learnalign_complete.json`.

    Args:
        run (`str`): Id of the run.
        step (`int`): Optimizer step.
        processes (`int`): Ranks that saved it.
        mid_generation (`bool`): Whether it was saved in the middle of a generation.
        resumable (`bool`): Whether the optimizer is there (`save_only_model=False`).
        files (mapping): Each file by its name, with `/` for folders.
    """

    run: str
    step: int
    processes: int
    mid_generation: bool
    resumable: bool
    files: Mapping[str, FileSeal]


def digest_of(*parts: Any) -> str:
    """Digest of some bytes, or of arrays that lie in memory like them, one after the other."""
    found = xxhash.xxh3_128()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def seal_of(path: Path, sync: bool = False) -> FileSeal:
    """Size and digest of a file.

    Args:
        path (`Path`): The file.
        sync (`bool`, *optional*, defaults to `False`): Wait until it has reached the disk.

    Raises:
        `OSError`: If it cannot be read.
    """
    found, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return FileSeal(size, found.hexdigest())


def fits(path: Path, seal: FileSeal) -> bool:
    """Whether a file is there as it was saved."""
    return _problem_of_file(path, seal, True) is None


def files_of(folder: Path) -> list[str]:
    """Names of the files of a checkpoint, without the mark and what is there while it is saved; sorted."""
    names = []
    for path in folder.rglob("*"):
        passing = path.name == _FOREIGN or path.name.endswith(".tmp")
        if path.is_file() and path != folder / COMPLETE and not passing:
            names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def sealed_files(folder: Path) -> dict[str, FileSeal]:
    """Size and digest of each file of a checkpoint, which then has reached the disk."""
    return {name: seal_of(folder / name, sync=True) for name in files_of(folder)}


def write_mark(folder: Path, mark: Mark) -> None:
    """Say that a checkpoint is whole.

    Raises:
        `StoreError`: If it cannot be written.
    """
    values = {"format": FORMAT, **asdict(mark)}
    write_json(folder / COMPLETE, {**values, "digest": _digest_of_values(values)})


def _digest_of_values(values: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(values, sort_keys=True).encode())


def read_mark(folder: Path) -> Mark:
    """The mark of a checkpoint.

    Raises:
        `ValueError`: If there is none, or it is damaged: what is wrong, in words.
    """
    try:
        values = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"it has no {COMPLETE}, so its save was interrupted, or LearnAlignCallback was not there"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{COMPLETE} cannot be read ({error})") from error
    if not isinstance(values, dict) or values.pop("digest", None) != _digest_of_values(values):
        raise ValueError(f"{COMPLETE} is damaged: it does not have the digest of its own contents")
    if values.pop("format") != FORMAT:
        raise ValueError(f"{COMPLETE} was written by another version of trl_learnalign")
    files = {name: FileSeal(**seal) for name, seal in values.pop("files").items()}
    return Mark(**values, files=files)


def problem_of(folder: Path, with_digests: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words that go on after its name; `None` if it is whole.

    Args:
        folder (`Path`): The checkpoint.
        with_digests (`bool`, *optional*, defaults to `True`): Read every file; else their sizes alone are compared.
    """
    try:
        mark = read_mark(folder)
    except ValueError as error:
        return str(error)
    if not mark.resumable:
        return "it was saved with save_only_model=True, so without the optimizer"
    for name, seal in mark.files.items():
        problem = _problem_of_file(folder / name, seal, with_digests)
        if problem is not None:
            return f"{name} {problem}"
    return None


def _problem_of_file(path: Path, seal: FileSeal, with_digest: bool) -> str | None:
    if not path.exists():
        return "is missing"
    if not path.is_file():
        return "is no file"
    try:
        size = path.stat().st_size
        if size != seal.size:
            return f"has {size:,} bytes, and {seal.size:,} were saved"
        if with_digest and seal_of(path) != seal:
            return (
                "is damaged: its content does not have the digest that was noted when it was saved"
            )
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Folders that are named like checkpoints, the highest step first."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        if folder.is_dir() and (match := _NAME.fullmatch(folder.name)):
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def newest_whole(output_dir: str | Path, run: str | None = None) -> Path | None:
    """The checkpoint with the highest step whose files all have their digests, or `None`.

    Args:
        output_dir (`str` or `Path`): Where checkpoints lie.
        run (`str`, *optional*): Id of the run that it must be of; by default any.
    """
    for folder in checkpoints_in(output_dir):
        if problem_of(folder) is None and run in (None, read_mark(folder).run):
            return folder
    return None


def way_on(output_dir: str | Path, run: str | None = None) -> str:
    """What to resume in place of a checkpoint that cannot be, as a sentence; arguments as in [`newest_whole`]."""
    whole = newest_whole(output_dir, run)
    if whole is None:
        return (
            f"No checkpoint in {output_dir} is whole: restore that file from a copy, or begin anew with another "
            "output_dir."
        )
    return (
        f"The newest whole checkpoint is {whole}: go on there with train(resume_from_checkpoint={str(whole)!r}), for "
        f"a recipe --resume_from_checkpoint {whole}."
    )
