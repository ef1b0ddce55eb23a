"""Omniglot with rotations: many small tasks, each to tell twelve characters apart.

Task k holds characters 12 k .. 12 k + 11 in the order of their numbers, every drawing turned by 0, 90, 180 and 270 degrees,
labels 0 .. 11. With all drawings of 964 characters that are 80 tasks (100 tasks of 1,200 characters are the paper's).
Sources: Lake, Salakhutdinov and Tenenbaum 2015, MIT licence; the protocol of Yoon et al. 2020 (arXiv 1902.09432).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from ssm_nn.models.downloads import DataError, DataFile, read_file
from ssm_nn.models.stream_making import EXAMPLES, check_seed, generator, natural_order, shaped
from ssm_nn.models.task_streams import LazyTasks, TaskStream
from ssm_nn.tasks import Task

__all__ = ["Drawings", "omniglot", "omniglot_rotation"]

PARTIAL_FILE = DataFile(
    "omniglot/omniglot_background_partial_28x28.npz",
    sha256="4bae07d9af2bb5731670ec2c46097dabe580861bacb9679dec6a0612bbb37ded",
    size=1537209,
)
FULL_FILE = DataFile(
    "omniglot/images_background.zip",
    md5="68d2efa1b9178cc56df9314c21c6e718",
    mirrors=("https://raw.githubusercontent.com/brendenlake/omniglot/master/python/images_background.zip",),
)
SIDE = 28
TURNS = 4
TEST_SHARE = 0.2  # of a character's drawings


class Drawings(NamedTuple):
    """Images (N, 28, 28) with ink 255, the character of each (N,), and where they come from."""

    images: UInt8[np.ndarray, "n 28 28"]
    character: Int[np.ndarray, " n"]
    source: str


def omniglot(complete: bool = False, folder: str | Path | None = None) -> Drawings:
    """The background characters at 28 x 28, characters numbered from 0 in the order of alphabets and names.

    Args:
        complete: all 20 drawings of each character, by download; else the partial set, 12 to 20 drawings of each, for which
            no download is known: figures measured on it are figures of the partial set.
        folder: the only data folder to look in; None looks in SSM_NN_DATA, in the cache, and then downloads.

    Raises:
        DataError: a missing, damaged or unreachable file.
    """
    if complete:
        return Drawings(*read_archive(read_file(FULL_FILE, folder)), "Omniglot (Lake et al. 2015), MIT")
    with np.load(io.BytesIO(read_file(PARTIAL_FILE, folder)), allow_pickle=False) as arrays:
        images, number = arrays["images"], arrays["character_id"]
    character = np.unique(number, return_inverse=True)[1].astype(np.int32)
    return Drawings(images, character, "Omniglot (Lake et al. 2015), MIT: 16,833 of 19,280 drawings, a partial set")


def read_archive(packed: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The zip file of ``<alphabet>/character<n>/<m>_<drawer>.png``, 105 x 105 with black ink, averaged down to 28 x 28.

    Raises DataError for a file that is no such archive.
    """
    from PIL import Image  # only needed where something is decoded

    images, names = [], []
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
                with Image.open(io.BytesIO(archive.read(name)), formats=["PNG"]) as image:
                    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
                images.append(255 - np.asarray(small))
                names.append(name.rsplit("/", 1)[0])
    except zipfile.BadZipFile as error:
        raise DataError(f"content is no zip file of Omniglot: {error}") from error
    if not images:
        raise DataError("content holds no drawing <alphabet>/<character>/<name>.png")
    return np.stack(images), np.unique(names, return_inverse=True)[1].astype(np.int32)


def omniglot_rotation(
    drawings: Drawings,
    num_tasks: int | None = None,
    characters: int = 12,
    seed: int = 0,
    order: Sequence[int] | None = None,
    flatten: bool = False,
) -> TaskStream:
    """Tasks of ``characters`` characters each, every drawing in four rotations, the same of a drawing all on one side.

    All tasks have the same number of examples: where a character has fewer drawings, copies stand under the mask.

    Args:
        drawings: from ``omniglot``.
        num_tasks: T; None takes as many as there are characters for.
        characters: a task, labels 0 .. characters - 1.
        seed: non-negative; says which drawings are the test set, a fifth of each character's.
        order: a permutation of 0 .. T - 1, the natural numbers of the tasks in the order in which they come.
        flatten: inputs are vectors instead of images.

    Returns:
        Tasks with "x" float32 in [0, 1] (N, 28, 28) and "y" int32, a mask, and the context {"task": int32, the number k}.

    Raises:
        ValueError: an argument out of range.
    """
    check_seed(seed)
    available = int(drawings.character.max()) + 1
    if not 1 < characters <= available:
        raise ValueError(f"characters is {characters}; 2 to {available} are accepted, as many as there are")
    possible = available // characters
    num_tasks = possible if num_tasks is None else num_tasks
    if not 1 <= num_tasks <= possible:
        raise ValueError(f"num_tasks is {num_tasks}; 1 to {possible} are accepted with {characters} characters each")
    natural = natural_order(order, num_tasks)
    most = int(np.bincount(drawings.character).max())
    tested = max(round(TEST_SHARE * most), 1)

    def rows_of(k: int, test: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, labels and mask, ``most - tested`` or ``tested`` to a character."""
        rows, labels, mask, room = [], [], [], tested if test else most - tested
        for label in range(characters):
            own = np.flatnonzero(drawings.character == characters * k + label)
            own = generator(seed, EXAMPLES, characters * k + label).permutation(own)
            share = max(round(TEST_SHARE * len(own)), 1)
            chosen = own[:share] if test else own[share:]
            rows.append(np.resize(chosen, room))
            labels.append(np.full(room, label, np.int32))
            mask.append(np.arange(room) < len(chosen))
        return np.concatenate(rows), np.concatenate(labels), np.concatenate(mask)

    def task(t: int, test: bool) -> Task:
        rows, labels, mask = rows_of(natural[t], test)
        upright = drawings.images[rows].astype(np.float32) / np.float32(255)
        turned = np.concatenate([np.rot90(upright, quarter, (1, 2)) for quarter in range(TURNS)])
        data = {"x": shaped(np.ascontiguousarray(turned), flatten), "y": np.tile(labels, TURNS)}
        return Task(data, {"task": np.int32(natural[t])}, np.tile(mask, TURNS))

    settings = {"dataset": "omniglot", "shift": "rotation", "num_tasks": num_tasks, "characters": characters}
    settings |= {"seed": seed, "order": list(natural), "flatten": flatten, "source": drawings.source}
    return TaskStream(
        name="omniglot with rotations",
        train=LazyTasks(lambda t: task(t, False), num_tasks),
        test=LazyTasks(lambda t: task(t, True), num_tasks, keep=True),
        num_classes=characters,
        input_shape=(SIDE * SIDE,) if flatten else (SIDE, SIDE),
        settings=settings,
    )
