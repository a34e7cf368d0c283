"""Ways in which a file on a disk goes bad."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, Path | None], None]
"""Spoils a file, given another one (of an older copy, or of another run) where the way has one."""


def _cleared(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def missing(path: Path, _: Path | None) -> None:
    path.unlink()


def empty(path: Path, _: Path | None) -> None:
    path.write_bytes(b"")


def truncated(path: Path, _: Path | None) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, _: Path | None) -> None:
    """One bit in the last third, where files have their contents rather than their headings."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(bytes(content))


def zeroed(path: Path, _: Path | None) -> None:
    """What a disk without power leaves: the size, and nothing in the second half."""
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))


def replaced(path: Path, other: Path | None) -> None:
    if other is None or not other.is_file():
        path.unlink()
        return
    content = other.read_bytes()
    path.unlink()
    path.write_bytes(content)


def a_folder(path: Path, _: Path | None) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path, _: Path | None) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere" / "at all")


WAYS: dict[str, Damage] = {
    "missing": missing,
    "empty": empty,
    "truncated": truncated,
    "flipped": flipped,
    "zeroed": zeroed,
    "older": replaced,
    "another run's": replaced,
    "a folder": a_folder,
    "a dangling link": a_dangling_link,
}
