"""Items of an iterator read ahead in a thread: the next task is read while the present one is learnt."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

from ssm_nn.inference.checks import check_count

__all__ = ["prefetched"]


class _Read(NamedTuple):
    """An item, or how the iterator ended: by the error, or well."""

    item: Any = None
    ended: bool = False
    error: BaseException | None = None


def prefetched[Item](items: Iterable[Item], depth: int = 1) -> Generator[Item, None, None]:
    """The items in their order; while one is in use, at most ``depth`` more are read in another thread.

    For ``LaplaceFilter.run`` over tasks and ``MeanFieldFilter.run`` over batches that are read from files, decoded or drawn,
    one at a time; an engine leaves the interpreter to the reader while it computes. JAX's context managers
    (``enable_x64``, ``set_mesh``) belong to a thread: give NumPy arrays, which the engine takes to its own devices.

    Args:
        items: a generator, a sequence, a data loader. Reading begins when the first item is asked for.
        depth: items held beside the one in use, >= 1.

    Returns:
        An iterator. An error of ``items`` is raised where the item would have come. The thread ends with the items, or once
        the iterator is closed or forgotten, after the item that it is reading; a generator is then closed.

    Raises:
        ValueError: for a depth below 1, or what holds no items one after another.
    """
    check_count(depth=depth)
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise ValueError(
            f"items is {type(items).__name__}; an iterable of tasks or batches is accepted: a list, a generator, a loader"
        )
    return _handed_out(items, depth)


def _handed_out[Item](items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    read: SimpleQueue[_Read] = SimpleQueue()
    room, abandoned = threading.Semaphore(depth), threading.Event()
    arguments = (items, read, room, abandoned)
    threading.Thread(target=_read_ahead, args=arguments, name="prefetch", daemon=True).start()
    try:
        while not (found := read.get()).ended:
            room.release()
            yield found.item
        if found.error is not None:
            raise found.error
    finally:
        abandoned.set()
        room.release()


def _read_ahead(
    items: Iterable[Any], read: SimpleQueue[_Read], room: threading.Semaphore, abandoned: threading.Event
) -> None:
    try:
        iterator = iter(items)
        try:
            while room.acquire() and not abandoned.is_set():
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                read.put(_Read(item))
                del item  # not held while the next is read
        finally:
            if isinstance(iterator, Generator):
                iterator.close()
        read.put(_Read(ended=True))
    except BaseException as error:  # of any kind: the thread that asked for the items is the one to hear of it
        read.put(_Read(ended=True, error=error))
