"""CIFAR-10 and CIFAR-100 as unsigned bytes, from the original archives and from a JPEG copy of CIFAR-10."""

import hashlib
import io
import lzma
import os
import pickle
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from ssm_nn.models.downloads import DataError, DataFile, cache_folder, read_file

__all__ = ["ByteImages", "cifar", "cifar_jpeg", "read_batch", "read_jpeg_folders"]

CIFAR10_FILE = DataFile(
    "cifar-10/cifar-10-python.tar.gz",
    size=170498071,
    md5="c58f30108f718f92721af3b95e74349a",
    mirrors=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
)
CIFAR100_FILE = DataFile(
    "cifar-100/cifar-100-python.tar.gz",
    size=169001437,
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    mirrors=("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
)
JPEG_FILE = DataFile(
    "cifar10_jpeg/CIFAR-10-images.tar.xz",
    sha256="5a08e2383cddd95ca45eb3f89ec7c34d077c01e64e15cef009330122d0dd1f73",
    size=18578272,
)
# In the order of the original labels, which is that of the alphabet.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32


class ByteImages(NamedTuple):
    """Images of unsigned bytes, (N, 32, 32, 3) or grey, with int32 labels (N,), training and test."""

    train_x: UInt8[np.ndarray, "train height width *channels"]
    train_y: Int[np.ndarray, " train"]
    test_x: UInt8[np.ndarray, "test height width *channels"]
    test_y: Int[np.ndarray, " test"]


def cifar(file: DataFile, labels: str, folder: str | Path | None = None) -> ByteImages:
    """The original "python version" of CIFAR-10 or CIFAR-100, verified by its publisher's md5.

    Args:
        file: ``CIFAR10_FILE`` or ``CIFAR100_FILE``.
        labels: ``"labels"`` for CIFAR-10; ``"fine_labels"`` or ``"coarse_labels"`` for CIFAR-100.
        folder: the only data folder to look in; None looks in SSM_NN_DATA, in the cache, and then downloads.

    Raises:
        DataError: a missing, damaged or unreachable file.
    """
    train, test = [], []
    with tarfile.open(fileobj=io.BytesIO(read_file(file, folder)), mode="r:gz") as archive:
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            part = train if name == "train" or name.startswith("data_batch_") else test
            if part is train or name in ("test", "test_batch"):
                content = archive.extractfile(member)
                assert content is not None  # a file, as its name says
                part.append((name, *read_batch(content.read(), labels)))
    train.sort(key=lambda batch: batch[0])
    return ByteImages(*_joined(train), *_joined(test))


def _joined(batches: list[tuple[str, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([batch[1] for batch in batches]), np.concatenate([batch[2] for batch in batches])


class _ArraysOnly(pickle.Unpickler):
    """A pickle of Python 2 that may hold NumPy arrays and nothing else that is made by calling something."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            # Python 2 wrote the flags as 0 and 1, which NumPy is about to refuse
            return lambda kind, align=False, copy=False: np.dtype(kind, bool(align), bool(copy))
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):  # how newer Pythons write bytes for older ones
            return lambda text, encoding: text.encode(encoding)
        raise DataError(f"content asks for {module}.{name}; a batch of CIFAR holds arrays, lists and bytes only")


def read_batch(content: bytes, labels: str) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int[np.ndarray, " n"]]:
    """One pickled batch: a dict with ``data`` (N, 3072), red, then green, then blue, row by row, and lists of labels.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html. Raises DataError where the content is something else.
    """
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        rows, numbers = np.asarray(batch[b"data"]), np.asarray(batch[labels.encode()])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"content is no batch of CIFAR with {labels!r} ({type(error).__name__}: {error})") from error
    if rows.dtype != np.uint8 or rows.shape != (len(numbers), 3 * SIDE * SIDE):
        raise DataError(
            f"content holds {rows.dtype} {rows.shape} and {len(numbers)} labels; uint8 (N, 3072) is a batch"
        )
    return np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)), numbers.astype(np.int32)


def cifar_jpeg(folder: str | Path | None = None) -> ByteImages:
    """All 60,000 images of CIFAR-10 after JPEG compression: a lossy stand-in, the images in another order.

    The archive is verified by its sha256 and decoded once, into the cache folder; a copy there is used only while its
    own checksum and that of the archive are those written beside it.

    Raises:
        DataError: a missing or damaged archive, a cache folder that cannot be written.
    """
    packed = read_file(JPEG_FILE, folder)
    decoded = cache_folder() / "cifar10_jpeg" / "decoded.npz"
    note = decoded.with_suffix(".sha256")
    source = hashlib.sha256(packed).hexdigest()
    try:
        content = decoded.read_bytes()
        if note.read_text(encoding="ascii").split() == [hashlib.sha256(content).hexdigest(), source]:
            with np.load(io.BytesIO(content)) as arrays:
                return ByteImages(**arrays)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # not there, or not what we wrote: decoded anew
    images = read_jpeg_folders(packed)
    buffer = io.BytesIO()
    np.savez(buffer, **images._asdict())
    content = buffer.getvalue()
    _write(decoded, content)
    _write(note, f"{hashlib.sha256(content).hexdigest()} {source}\n".encode("ascii"))
    return images


def read_jpeg_folders(packed: bytes) -> ByteImages:
    """A tar.xz of ``train/<class>/<number>.jpg`` and ``test/<class>/<number>.jpg``, in the order of the names.

    Raises DataError for a class that CIFAR-10 has not, or an image of another size.
    """
    from PIL import Image  # only needed where something is decoded

    parts: dict[str, list[tuple[str, np.ndarray, int]]] = {"train": [], "test": []}
    # unpacked as a whole first: read through a decompressor, 60,000 small members take minutes
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(packed))) as archive:
        for member in archive:
            part, *middle = member.name.split("/")[:-1] or [""]
            if not member.name.endswith(".jpg") or part not in parts:
                continue
            if len(middle) != 1 or middle[0] not in CLASSES:
                raise DataError(
                    f"content holds {member.name}; train or test, one of {', '.join(CLASSES)}, and a number"
                )
            content = archive.extractfile(member)
            assert content is not None  # a file, as its name says
            with Image.open(content, formats=["JPEG"]) as image:
                pixels = np.asarray(image.convert("RGB"))
            if pixels.shape != (SIDE, SIDE, 3):
                raise DataError(f"content holds {member.name} of shape {pixels.shape}; (32, 32, 3) is expected")
            parts[part].append((member.name, pixels, CLASSES.index(middle[0])))

    def arrays(part: str) -> tuple[np.ndarray, np.ndarray]:
        examples = sorted(parts[part], key=lambda example: example[0])
        if not examples:
            raise DataError(f"content holds no image {part}/<class>/<number>.jpg")
        return np.stack([pixels for _, pixels, _ in examples]), np.array([k for *_, k in examples], np.int32)

    return ByteImages(*arrays("train"), *arrays("test"))


def _write(target: Path, content: bytes) -> None:
    """All of it or nothing: into a temporary file beside ``target``, which then takes its name."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=target.name + ".", suffix=".part", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as part:
                part.write(content)
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{target.parent} cannot be written ({error.strerror}); name a folder for the cache in SSM_NN_CACHE"
        ) from error
