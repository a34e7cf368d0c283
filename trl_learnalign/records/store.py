"""Atomic, checksummed files: shards, tables, and the mark of a complete checkpoint.

A store is a folder with `manifest.json`, which says what its contents depend on, and files
`shard-00000-<blake2 of the content>.safetensors`. A file appears under its final name only when it is whole (written
under a temporary name, fsynced, renamed), and its name proves its content. A store of another run is refused by
naming both sides; finished work is never mixed with other work and never done twice.
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
"""Bytes by which is tried whether the disk is full."""


class StoreError(RuntimeError):
    """A store cannot be written or trusted; the message says what to do."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash.

    Raises:
        `StoreError`: If the disk is full or the folder cannot be written; what was there before is intact.
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
    """Have a file in a second place: a second name of it where the file system allows it, else a copy.

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
    """The name that a file is written under; nothing of that name is left if that fails."""
    temporary = path.with_name(layout.temporary(path.name, os.getpid()))
    try:
        yield temporary
    except OSError:
        # On a disk that has become read-only this fails as well, and it is the first error that tells.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is raised when a file or a folder cannot be written, by whatever library, in one sentence.

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


# torch and safetensors write from outside Python: torch says at which byte it stopped, and not why.
_WRITER_OF_TORCH = re.compile("PytorchStreamWriter|inline_container|iostream|unexpected pos")
_NUMBER_OF_SAFETENSORS = re.compile(r"os error (\d+)")


def _of_the_disk(error: BaseException, path: Path) -> OSError | None:
    """The error of the operating system that is behind one of a library, `None` if none is."""
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
    """What the operating system says to a file that is written there now."""
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
    # The rename itself must reach the disk too; not every file system lets a folder be opened.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def advice(error: OSError, path: Path) -> str:
    """Why a file cannot be written, and what to do, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "the disk is full: make space"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "the folder cannot be written: give write permission or choose another output_dir (or record_dir)"
    elif error.errno == errno.EISDIR:
        remedy = "it is a folder: move it away"
    else:
        remedy = f"{error.strerror or error}: see to it"
    return f"Cannot write {path}: {remedy}, then run the same command again. Everything written before is intact."


def check_writable(folder: Path) -> None:
    """Check that a folder can be made and written, without making it.

    Raises:
        `StoreError`: Naming the folder that stands in the way.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise StoreError(
            f"{folder} cannot be a folder: {nearest} is a file. Choose another output_dir or record_dir."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StoreError(advice(OSError(errno.EACCES, os.strerror(errno.EACCES)), folder))


def check_no_folders(folder: Path) -> None:
    """Check that nothing which a record keeps in a file is a folder: one would be found when the file is written.

    Args:
        folder (`Path`): The record folder. Its own folders have no suffix in their names.

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
    """What JSON has no form for, as something that it has one for."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], line: str) -> list[str]:
    """How two identities differ, in words.

    Args:
        theirs (mapping): Plain values by name, groups of them as mappings: what was written.
        ours (mapping): What would be written now.
        line (`str`): Format of a difference: name, their value, our value.

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
        folder (`Path`): Where they lie; several processes may share it, each writing its own shards.
        fingerprint (mapping): What the shards depend on, as plain JSON values.
        shards (`int`): How many there will be.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], shards: int):
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.shards = shards
        self._verified: set[str] = set()

    @property
    def manifest_path(self) -> Path:
        """`manifest.json`."""
        return self.folder / layout.MANIFEST

    def differences(self) -> list[str]:
        """How a store found in the folder differs from this one, `[]` if it does not or none is there."""
        if not self.manifest_path.exists():
            return []
        try:
            manifest = json.loads(self.manifest_path.read_text())
        except (OSError, ValueError) as error:
            return [f"its {layout.MANIFEST} cannot be read ({error})"]
        if not isinstance(manifest, dict) or not isinstance(manifest.get("fingerprint"), dict):
            return [f"its {layout.MANIFEST} is not of the form that is written here"]
        theirs = {
            "format": manifest.get("format"),
            "shards": manifest.get("shards"),
            **manifest["fingerprint"],
        }
        ours = {"format": FORMAT, "shards": self.shards, **self.fingerprint}
        return differences(theirs, ours, "{}: it was written for {!r}, this run is {!r}")

    def create(self) -> None:
        """Write the manifest of a new store; on one process only."""
        manifest = {"format": FORMAT, "shards": self.shards, "fingerprint": self.fingerprint}
        write_json(self.manifest_path, manifest)

    def finished(self) -> dict[int, Path]:
        """Paths of the shards that are there, by number."""
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
        """Read a shard; its content is checked against its name the first time.

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
            return load_file(path)  # mapped into memory rather than copied
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read ({error}). Delete it and run the same command again; only its prompts are "
                "measured anew."
            ) from error
        match = layout.SHARD.fullmatch(path.name)
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        if match is None or digest != match[2]:
            raise StoreError(
                f"{path} is damaged: its content ({len(content)} bytes) does not match the checksum in its name. "
                "Delete this file and run the same command again; only its prompts are measured anew."
            )
        self._verified.add(path.name)
        return load(content)

    def read_all(self, numbers: Iterable[int]) -> Iterable[tuple[int, dict[str, torch.Tensor]]]:
        """Shards one after the other, so that only one is in memory."""
        paths = self.finished()
        for number in numbers:
            yield number, self._read(number, paths.get(number))


# ---- Tables ---------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> pa.Table:
    """Read a Parquet file.

    Raises:
        `FileNotFoundError`: If it is not there.
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


# ---- Mark of a complete checkpoint ----------------------------------------------------------------------------------
# A process that dies while it saves leaves a folder without the mark. A disk that loses power may leave the mark and
# files of the right size that hold nothing: so the files reach the disk before the mark is written, and their digests
# are compared before a run goes on with them. XXH3 reads as fast as memory does (some 10 GB a second); it tells damage
# from none, and is no protection against somebody who wants to deceive.

MARK_FORMAT = 1
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
    values = {"format": MARK_FORMAT, **asdict(mark)}
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
    if values.pop("format") != MARK_FORMAT:
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


def resume_remedy(output_dir: str | Path, run: str | None = None) -> str:
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
