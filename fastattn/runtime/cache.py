"""A folder of compiled kernels that processes share. Entries are whole or absent, and nobody else may write them.

What cannot be cached costs a compilation and one warning, never a call.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
import warnings
from pathlib import Path

from fastattn.runtime import env

_MAGIC = b"fastattn1\n"
_DIGEST = hashlib.sha256().digest_size
_warned = False


@functools.cache
def folder() -> Path | None:
    """Where entries lie; None, after a warning that says why, when nothing is kept. Created when it is missing."""
    try:
        place = location()
        if place is None:
            return None
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = place.stat()
    except (OSError, RuntimeError) as failure:  # RuntimeError: no home directory
        _warn(f"the folder cannot be used: {failure}")
        return None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        _warn(
            f"{place} must be a folder that belongs to this user and that nobody else can write (chmod 700), got owner "
            f"{facts.st_uid} and mode {stat.S_IMODE(facts.st_mode):o}"
        )
        return None
    return place


def location() -> Path | None:
    """Where the folder is or would be; None when caching is switched off. Raises RuntimeError without a home directory."""
    if env.CUDA_CACHE == "off":
        return None
    if env.CUDA_CACHE:
        return Path(env.CUDA_CACHE).expanduser()
    home = Path(env.CACHE_HOME or "")
    return (home if home.is_absolute() else Path.home() / ".cache") / "fastattn" / "cuda"


def read(name: str) -> bytes | None:
    """The content of an entry; None when there is none, or when it is damaged (it is written again then)."""
    place = folder()
    if place is None:
        return None
    try:
        with open(place / name, "rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            stored = file.read()
    except OSError:
        return None
    start = len(_MAGIC) + _DIGEST
    content = stored[start:]
    if stored[:start] != _MAGIC + hashlib.sha256(content).digest():
        return None
    return content


def write(name: str, content: bytes) -> None:
    """Keep an entry. A reader at the same time sees the old one or the new one."""
    place = folder()
    if place is None:
        return
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=place, prefix=".", suffix=".part")
        with open(descriptor, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(content).digest() + content)
        os.replace(temporary, place / name)
    except OSError as failure:  # a full or read-only disk, a quota
        _warn(f"{place} cannot be written: {failure}")
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _warn(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"fastattn: CUDA kernels are compiled anew in every process, because {reason}", RuntimeWarning, stacklevel=3
        )
