"""Atomic, checksummed files: shards, tables, and the completeness marker of checkpoints.

A store is a folder with `manifest.json`, which states what its contents depend on, and files
`shard-00000-<blake2 of the content>.safetensors`. A file gets its final name only when it is complete (it is written
under a temporary name, fsynced and renamed), and the name contains the digest of its content. A store of another run
is refused with a list of the differences. Results of different runs are never mixed, and finished work is not
repeated.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from trl_learnalign.records import layout
from trl_learnalign.records.layout import COMPLETE, REMEDY

logger = logging.getLogger(__name__)

FORMAT = 1

RECORD_SUFFIXES = (".json", ".parquet", ".safetensors")

_TRIAL = 1 << 20
"""Bytes of the test write that checks whether the disk is full."""


class StoreError(RuntimeError):
    """A store cannot be written or trusted; the message gives the remedy."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, even if the process crashes.

    Raises:
        `StoreError`: If the disk is full or the folder cannot be written; an existing file is unchanged.
    """
    with writing(path), _temporary(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)


def same_file(source: Path, target: Path) -> None:
    """Create a second copy of a file: a hard link if the file system supports it, otherwise a copy.

    Raises:
        `StoreError`: If it cannot be written.
    """
    if target.exists() and target.samefile(source):
        return
    try:
        with _temporary(target) as temporary:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            os.link(source, temporary)
            os.replace(temporary, target)
    except OSError:
        write_atomically(target, source.read_bytes())


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; the temporary file is removed on failure."""
    temporary = path.with_name(layout.temporary(path.name, os.getpid()))
    try:
        yield temporary
    except OSError:
        # On a disk that became read-only this fails as well; the first error is the informative one.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert any library's error about an unwritable file or folder into a one-sentence `StoreError`.

    Args:
        path (`Path`): The file or the folder.

    Raises:
        `StoreError`: If the disk is full or the folder cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = _of_the_disk(error, path)
        if cause is None:
            raise
        raise StoreError(advice(cause, path)) from error


# torch and safetensors write from native code: torch reports at which byte it stopped, but not the reason.
_WRITER_OF_TORCH = re.compile("PytorchStreamWriter|inline_container|iostream|unexpected pos")
_NUMBER_OF_SAFETENSORS = re.compile(r"os error (\d+)")


def _of_the_disk(error: BaseException, path: Path) -> OSError | None:
    """The operating system error that caused a library's error, `None` if there is none."""
    if isinstance(error, StoreError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error
    text = str(error)
    if found := _NUMBER_OF_SAFETENSORS.search(text):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if _WRITER_OF_TORCH.search(text):
        return _tried(path) or OSError(errno.EIO, text.splitlines()[0])
    return None


def _tried(path: Path) -> OSError | None:
    """The operating system error of a test write at this path, if any."""
    folder = path if path.is_dir() else path.parent
    try:
        with _temporary(folder / "trial") as temporary:
            try:
                with open(temporary, "wb") as file:
                    file.write(bytes(_TRIAL))
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk, too. Some file systems do not allow a folder to be opened.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def advice(error: OSError, path: Path) -> str:
    """Why a file cannot be written, and the remedy, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "the disk is full: free some space"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "the folder is not writable: grant write permission or choose another output_dir (or record_dir)"
    elif error.errno == errno.EISDIR:
        remedy = "it is a folder: move it away"
    else:
        remedy = f"{error.strerror or error}: fix that"
    return f"Cannot write {path}: {remedy}, then run the same command again. Everything written before is intact."


def check_writable(folder: Path) -> None:
    """Check that a folder can be created and written, without creating it.

    Raises:
        `StoreError`: Naming the path that prevents it.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise StoreError(
            f"{folder} cannot be a folder: {nearest} is a file. Choose another output_dir or record_dir."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StoreError(advice(OSError(errno.EACCES, os.strerror(errno.EACCES)), folder))


def check_no_folders(folder: Path) -> None:
    """Check that no folder has the name of a record file, which would otherwise fail only when the file is written.

    Args:
        folder (`Path`): The record folder. The names of its own folders have no suffix.

    Raises:
        `StoreError`: Naming the first such folder.
    """
    for path in sorted(folder.rglob("*.*")):
        if path.suffix in RECORD_SUFFIXES and path.is_dir():
            raise StoreError(advice(IsADirectoryError(errno.EISDIR, ""), path))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=plain)
    write_atomically(path, text.encode() + b"\n")


def plain(value: Any) -> Any:
    """Convert a value that JSON cannot represent into one that it can."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], line: str) -> list[str]:
    """The differences of two identities, in words.

    Args:
        theirs (mapping): The stored values: plain values by name, groups of them as mappings.
        ours (mapping): The current values.
        line (`str`): Format of a difference: name, stored value, current value.

    Returns:
        `list[str]`: `[]` if they are the same.
    """
    names = sorted({*theirs, *ours})
    pairs = {name: (theirs.get(name), ours.get(name)) for name in names}
    return list(_different_pairs(pairs, line))


def _different_pairs(pairs: Mapping[str, tuple[Any, Any]], line: str) -> Iterator[str]:
    for name, (their, our) in pairs.items():
        if isinstance(their, Mapping) and isinstance(our, Mapping):
            group = "" if name == "settings" else f"{name}."
            names = sorted({*their, *our})
            yield from _different_pairs(
                {group + key: (their.get(key), our.get(key)) for key in names}, line
            )
        elif their != our:
            yield line.format(name, their, our)


class ShardStore:
    """One stage's shards.

    Args:
        folder (`Path`): Their folder; several processes may share it, and each writes its own shards.
        fingerprint (mapping): What the shards depend on, as plain JSON values.
        shards (`int`): Total number of shards.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], shards: int):
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.shards = shards
        self._verified: set[str] = set()

    @property
    def manifest_path(self) -> Path:
        """Path of `manifest.json`."""
        return self.folder / layout.MANIFEST

    def differences(self) -> list[str]:
        """The differences between the store on disk and this one, `[]` if there are none or there is no store."""
        if not self.manifest_path.exists():
            return []
        try:
            manifest = json.loads(self.manifest_path.read_text())
        except (OSError, ValueError) as error:
            return [f"its {layout.MANIFEST} cannot be read ({error})"]
        if not isinstance(manifest, dict) or not isinstance(manifest.get("fingerprint"), dict):
            return [f"its {layout.MANIFEST} does not have the expected form"]
        theirs = {
            "format": manifest.get("format"),
            "shards": manifest.get("shards"),
            **manifest["fingerprint"],
        }
        ours = {"format": FORMAT, "shards": self.shards, **self.fingerprint}
        return differences(theirs, ours, "{}: the folder has {!r}, this run {!r}")

    def create(self) -> None:
        """Write the manifest of a new store; call it on one process only."""
        manifest = {"format": FORMAT, "shards": self.shards, "fingerprint": self.fingerprint}
        write_json(self.manifest_path, manifest)

    def finished(self) -> dict[int, Path]:
        """Paths of the existing shards, by number."""
        paths = {}
        for path in sorted(self.folder.glob(layout.SHARDS)):
            if match := layout.SHARD.fullmatch(path.name):
                paths[int(match[1])] = path
        return paths

    def write(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a shard.

        Raises:
            `StoreError`: If it cannot be written.
        """
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        write_atomically(self.folder / layout.shard(number, digest), content)

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """Read a shard; the first time, its content is checked against the digest in its name.

        Raises:
            `StoreError`: If it is missing, truncated or changed.
        """
        return self._read(number, self.finished().get(number))

    def _read(self, number: int, path: Path | None) -> dict[str, torch.Tensor]:
        if path is None:
            raise StoreError(
                f"Shard {number} is missing from {self.folder}: run the same command again to measure it."
            )
        if path.name in self._verified:
            return load_file(path)  # memory-mapped, not copied
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read ({error}). Delete it and run the same command again; only its prompts are "
                "measured again."
            ) from error
        match = layout.SHARD.fullmatch(path.name)
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        if match is None or digest != match[2]:
            raise StoreError(
                f"{path} is damaged: its content ({len(content)} bytes) does not match the checksum in its name. "
                "Delete this file and run the same command again; only its prompts are measured again."
            )
        self._verified.add(path.name)
        return load(content)

    def read_all(self, numbers: Iterable[int]) -> Iterable[tuple[int, dict[str, torch.Tensor]]]:
        """Yields the shards one by one, so that only one is in memory at a time."""
        paths = self.finished()
        for number in numbers:
            yield number, self._read(number, paths.get(number))


# ---- Tables ---------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> pa.Table:
    """Read a Parquet file.

    Raises:
        `FileNotFoundError`: If it does not exist.
        `ValueError`: If it is damaged, or a folder, of which pyarrow would read all files.
    """
    try:
        with open(path, "rb") as file:
            return pq.read_table(file)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is damaged ({error}): {REMEDY}.") from error


def parquet(table: pa.Table) -> bytes:
    """The content of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file; atomically."""
    write_atomically(path, parquet(table))


# ---- Completeness marker of checkpoints -----------------------------------------------------------------------------
# A process that dies while saving leaves a folder without the marker. After a power loss, a disk may have the marker
# and files of the right size without content. Files are therefore synced to disk before the marker is written, and
# their digests are compared before a run resumes. XXH3 is as fast as memory (about 10 GB per second). It detects
# damage, but does not protect against deliberate manipulation.

MARK_FORMAT = 1
_BLOCK = 1 << 22
_NAME = re.compile(r"checkpoint-(\d+)")
_FOREIGN = "checkpoint-is-incomplete.txt"
"""File that transformers' preemption support keeps in a folder while it saves."""


class CheckpointError(StoreError):
    """A checkpoint cannot be resumed; the message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class FileSeal:
    """Size and digest of a file at the time of saving.

    Args:
        size (`int`): Bytes.
        digest (`str`): XXH3 of its content, 32 hexadecimal digits.
    """

    size: int
    digest: str


@dataclass(frozen=True)
class Mark:
    """Contents of `learnalign_complete.json`.

    Args:
        run (`str`): Id of the run.
        step (`int`): Optimizer step.
        processes (`int`): Number of ranks that saved it.
        mid_generation (`bool`): Whether it was saved in the middle of a generation.
        resumable (`bool`): Whether it contains the optimizer state (`save_only_model=False`).
        files (mapping): The seal of each file, by its name with `/` for folders.
    """

    run: str
    step: int
    processes: int
    mid_generation: bool
    resumable: bool
    files: Mapping[str, FileSeal]


def digest_of(*parts: Any) -> str:
    """Digest of a sequence of bytes or contiguous arrays."""
    found = xxhash.xxh3_128()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def seal_of(path: Path, sync: bool = False) -> FileSeal:
    """Size and digest of a file.

    Args:
        path (`Path`): The file.
        sync (`bool`, *optional*, defaults to `False`): Wait until it is synced to disk.

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
    """Whether a file exists and is unchanged since it was saved."""
    return _problem_of_file(path, seal, True) is None


def files_of(folder: Path) -> list[str]:
    """Names of the files of a checkpoint, without the marker and temporary files; sorted."""
    names = []
    for path in folder.rglob("*"):
        passing = path.name == _FOREIGN or path.name.endswith(".tmp")
        if path.is_file() and path != folder / COMPLETE and not passing:
            names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def sealed_files(folder: Path) -> dict[str, FileSeal]:
    """Size and digest of each file of a checkpoint, after syncing it to disk."""
    return {name: seal_of(folder / name, sync=True) for name in files_of(folder)}


def write_mark(folder: Path, mark: Mark) -> None:
    """Mark a checkpoint as complete.

    Raises:
        `StoreError`: If it cannot be written.
    """
    values = {"format": MARK_FORMAT, **asdict(mark)}
    write_json(folder / COMPLETE, {**values, "digest": _digest_of_values(values)})


def _digest_of_values(values: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(values, sort_keys=True).encode())


def read_mark(folder: Path) -> Mark:
    """Read the marker of a checkpoint.

    Raises:
        `ValueError`: If there is none, or it is damaged; the message gives the reason.
    """
    try:
        values = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"it has no {COMPLETE}: saving was interrupted, or LearnAlignCallback was not active"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{COMPLETE} cannot be read ({error})") from error
    if not isinstance(values, dict) or values.pop("digest", None) != _digest_of_values(values):
        raise ValueError(f"{COMPLETE} is damaged: it does not match its digest")
    if values.pop("format") != MARK_FORMAT:
        raise ValueError(f"{COMPLETE} was written by another version of trl_learnalign")
    files = {name: FileSeal(**seal) for name, seal in values.pop("files").items()}
    return Mark(**values, files=files)


def problem_of(folder: Path, with_digests: bool = True) -> str | None:
    """What is wrong with a checkpoint, as a phrase that follows its name; `None` if it is complete.

    Args:
        folder (`Path`): The checkpoint.
        with_digests (`bool`, *optional*, defaults to `True`): Read every file; otherwise only sizes are compared.
    """
    try:
        mark = read_mark(folder)
    except ValueError as error:
        return str(error)
    if not mark.resumable:
        return "it was saved with save_only_model=True and has no optimizer state"
    for name, seal in mark.files.items():
        problem = _problem_of_file(folder / name, seal, with_digests)
        if problem is not None:
            return f"{name} {problem}"
    return None


def _problem_of_file(path: Path, seal: FileSeal, with_digest: bool) -> str | None:
    if not path.exists():
        return "is missing"
    if not path.is_file():
        return "is not a file"
    try:
        size = path.stat().st_size
        if size != seal.size:
            return f"has {size:,} bytes, but {seal.size:,} were saved"
        if with_digest and seal_of(path) != seal:
            return "is damaged: its content does not match the digest of when it was saved"
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Folders with checkpoint names, highest step first."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        if folder.is_dir() and (match := _NAME.fullmatch(folder.name)):
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def newest_whole(output_dir: str | Path, run: str | None = None) -> Path | None:
    """The checkpoint with the highest step whose files all match their digests, or `None`.

    Args:
        output_dir (`str` or `Path`): Folder of the checkpoints.
        run (`str`, *optional*): Id of the run that it must be of; defaults to any.
    """
    for folder in checkpoints_in(output_dir):
        if problem_of(folder) is None and run in (None, read_mark(folder).run):
            return folder
    return None


def resume_remedy(output_dir: str | Path, run: str | None = None) -> str:
    """A sentence on which checkpoint to resume instead of an unusable one; arguments as in [`newest_whole`]."""
    whole = newest_whole(output_dir, run)
    if whole is None:
        return (
            f"No checkpoint in {output_dir} is complete: restore that file from a copy, or start again with another "
            "output_dir."
        )
    return (
        f"The newest complete checkpoint is {whole}: resume from it with "
        f"train(resume_from_checkpoint={str(whole)!r}), or --resume_from_checkpoint {whole} for a recipe."
    )


def check_keys(what: str, state: Mapping[str, Any], known: Iterable[str]) -> None:
    """Check that a state has exactly the known keys.

    Args:
        what (`str`): Name of the state, for the message.
        state (mapping): The state as it was read.
        known (iterable of `str`): Its keys.

    Raises:
        `ValueError`: If it does not, naming missing and unknown keys.
    """
    known = set(known)
    missing, foreign = sorted(known - state.keys()), sorted(state.keys() - known)
    if missing or foreign:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(foreign)}, which this version does not know"] if foreign else []
        raise ValueError(
            f"The state of {what} in the checkpoint {' and '.join(parts)}: it was written by another version of "
            "trl_learnalign. Resume with that version, or start again with another output_dir."
        )
