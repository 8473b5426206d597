"""Writes files and folders whole or not at all, keeps other processes out of them, and digests their contents."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


logger = logging.getLogger(__name__)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or folder to, and renames it once the body is done.

    So `path` is never half-written. If the body raises, what it wrote is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (path.with_name(f".{path.name}.{suffix}") for suffix in ("partial", "replaced"))
    _remove(partial)  # left by a process that was killed
    _settle(path, replaced)
    try:
        yield partial
        if path.is_dir():  # `os.replace` takes the place of files only
            os.replace(path, replaced)
        os.replace(partial, path)
    finally:
        _remove(partial)
        _settle(path, replaced)


LOCK = ".lock"


@contextmanager
def locked(folder: Path, when_busy: Callable[[], None], name: str = LOCK) -> Iterator[None]:
    """Runs the body while no other process that asks for it has the folder, which is made if it is missing.

    On a file system without locks, as some clusters have, it says so and runs the body.

    Args:
        name: of the lock, where a folder has several.
        when_busy: called if another process has it; if that does not raise, this one waits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A group may share the folder. A marker file in place of a lock would outlive a job that was killed elsewhere.
    lock = FileLock(folder / name, mode=0o664, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        when_busy()
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        logger.warning("%s cannot be locked (%s): two processes at a time in it would not be noticed", folder, error)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claimed(folder: Path, user: str) -> Iterator[None]:
    """Keeps others out of a folder while the body runs.

    Args:
        user: what another process in it is called, such as "ablate.py".

    Raises:
        ValueError: there is another one.
    """

    def refuse() -> None:
        raise ValueError(f"another {user} runs in {folder}: wait for it, or name another output_dir") from None

    with locked(folder, refuse):
        yield


@contextmanager
def without_empty_folders(folder: Path) -> Iterator[None]:
    """Removes the folder, and parents of it, if they were made in the body and nothing is in them at its end."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _settle(path: Path, replaced: Path) -> None:
    """Puts a folder that was moved aside back if nothing took its place, and removes it otherwise."""
    if replaced.exists() and not path.exists():
        os.replace(replaced, path)
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(folder: Path, paths: Iterable[Path]) -> str:
    """16 hexadecimal digits that change with any file's content or its path relative to the folder."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(str(path.relative_to(folder)).encode() + bytes.fromhex(sha256(path)))
    return digest.hexdigest()[:16]


def text_id(text: str) -> int:
    """A non-negative 63-bit hash, the same in every process (Python's own `hash` is salted per process)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
