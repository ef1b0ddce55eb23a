"""How a command ends when it is stopped or cannot write, and what it leaves for the next: compiled programs."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from ssm_nn.models.downloads import cache_folder

__all__ = ["Terminated", "compiled_on_disk", "exit_code", "of_the_file_system", "stoppable"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MOST_COMPILED = 2**30  # bytes of compiled programs: those of some hundred different runs
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM into ``Terminated``, so that files half written are removed and the user hears how to go on."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handler
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 + the signal's number, as a shell gives it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def of_the_file_system(error: OSError, path: Path, again: str | None) -> str:
    """What the file system refused, in one sentence, and how to go on: ``again`` is the command, None before the start."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        reason = f"there is no space left for {path}"
    elif error.errno in _FORBIDDEN:
        reason = f"{error.filename or path} cannot be written ({reason})"
    elif error.filename:
        reason = f"{error.filename}: {reason}"
    ending = "." if again is None else f"; every finished task is saved. When it is mended, go on with: {again}"
    return f"{reason}{ending}"


@contextmanager
def compiled_on_disk() -> Iterator[None]:
    """Keep compiled programs in the cache folder, so that the next run does not compile them again.

    Whoever can write there could have this process run their code: the folder is the user's own, and one that others may
    write is not used. A folder that the user has named by JAX's own settings is left as it is.
    """
    folder = None if jax.config.jax_compilation_cache_dir else _own_folder(cache_folder() / "compiled")
    if folder is None:
        yield
        return
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.05,  # the small ones are many
    }
    with suppress(OSError):  # another run may trim at the same time
        _trim(folder)
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        with warnings.catch_warnings():
            # an entry that a killed process had half written: compiled anew
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _trim(folder: Path) -> None:
    """Remove the oldest programs where they take more than their share of the disk; JAX's own limit asks for a package."""
    files = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in folder.iterdir() if file.is_file())
    excess = sum(size for _, size, _ in files) - _MOST_COMPILED
    for _, size, file in files:
        if excess <= 0:
            break
        file.unlink(missing_ok=True)
        excess -= size


def _own_folder(folder: Path) -> Path | None:
    """The folder, made where it is missing; None where it cannot be written, or others may write it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError:
        return None
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if status.st_uid == os.getuid() and not others and os.access(folder, os.W_OK) else None
