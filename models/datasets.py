"""Data sets, as arrays: images with classes, the UCI regression sets, and two streams with concept drift.

``load("digits")`` needs no file; the others come from a folder, from SSM_NN_DATA, or by verified download (see
``ssm_nn.models.downloads``).
"""

import csv
import io
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ssm_nn.models.cifar import CIFAR10_FILE, CIFAR100_FILE, ByteImages, cifar, cifar_jpeg
from ssm_nn.models.downloads import DataError, DataFile, read_file
from ssm_nn.models.not_mnist import not_mnist
from ssm_nn.models.svhn import svhn

__all__ = ["Dataset", "DriftStream", "Regression", "load", "load_regression", "load_stream"]

NUM_DIGITS_TRAIN = 1297  # of 1,797; the other 500 are the test set
DIGITS_SPLIT_SEED = 0
NUM_REGRESSION_SPLITS = 20


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with classes, split into training and test examples.

    An image is (height, width), or (height, width, channels) in colour. Values lie in [0, 1]; labels in 0 ...
    num_classes - 1. ``source`` says where the data come from and under which licence.
    """

    name: str
    train_x: Float[np.ndarray, "train height width *channels"]
    train_y: Int[np.ndarray, " train"]
    test_x: Float[np.ndarray, "test height width *channels"]
    test_y: Int[np.ndarray, " test"]
    num_classes: int
    source: str


@dataclass(frozen=True, eq=False)
class Regression:
    """A regression set with one of its 20 standard splits, in the units of the file, nothing standardised."""

    name: str
    split: int
    train_x: Float[np.ndarray, "train features"]
    train_y: Float[np.ndarray, " train"]
    test_x: Float[np.ndarray, "test features"]
    test_y: Float[np.ndarray, " test"]
    source: str


@dataclass(frozen=True, eq=False)
class DriftStream:
    """Examples in the order of time, in the units of the file, with binary labels."""

    name: str
    x: Float[np.ndarray, "time features"]
    y: Int[np.ndarray, " time"]
    features: tuple[str, ...]
    num_classes: int
    source: str


@dataclass(frozen=True)
class _ImageFiles:
    train_x: DataFile
    train_y: DataFile
    test_x: DataFile
    test_y: DataFile
    source: str


def _image_files(folder: str, mirrors: tuple[str, ...], checksums: tuple[str, ...], source: str) -> _ImageFiles:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    sizes = (47040016, 60008, 7840016, 10008)
    train_x, train_y, test_x, test_y = (
        DataFile(f"{folder}/{name}-ubyte.gz", checksum, size, tuple(f"{base}/{name}-ubyte.gz" for base in mirrors))
        for name, checksum, size in zip(names, checksums, sizes, strict=True)
    )
    return _ImageFiles(train_x, train_y, test_x, test_y, source)


IMAGES = {
    "mnist": _image_files(
        "mnist",
        ("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist"),
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        "MNIST (LeCun, Cortes and Burges 1998), CC BY-SA 3.0",
    ),
    "fashion-mnist": _image_files(
        "fashion_mnist",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",),
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), MIT",
    ),
}

_KRIZHEVSKY = "(Krizhevsky 2009), no licence stated"
BYTE_IMAGES: dict[str, tuple[Callable[[str | Path | None], ByteImages], int, str]] = {
    "cifar-10": (lambda folder: cifar(CIFAR10_FILE, "labels", folder), 10, f"CIFAR-10 {_KRIZHEVSKY}"),
    "cifar-100": (lambda folder: cifar(CIFAR100_FILE, "fine_labels", folder), 100, f"CIFAR-100 {_KRIZHEVSKY}"),
    "cifar-100-coarse": (
        lambda folder: cifar(CIFAR100_FILE, "coarse_labels", folder),
        20,
        f"CIFAR-100, superclasses {_KRIZHEVSKY}",
    ),
    "cifar10_jpeg": (
        cifar_jpeg,
        10,
        "CIFAR-10 after JPEG compression (quality 75, median PSNR 30.5 dB): a lossy stand-in, not the original "
        + _KRIZHEVSKY,
    ),
    "svhn": (svhn, 10, "SVHN, cropped digits (Netzer et al. 2011), for research only"),
    "notmnist": (not_mnist, 10, "notMNIST, the small set (Bulatov 2011), no licence stated"),
}

REGRESSION_FILE = DataFile(
    "uci/UCI_Datasets.tar.gz", "d031469a3373b6adb6666b21b7be2b6a3e894567ab7b919bc6dea32fc90fc444", 3952640
)
REGRESSION = {
    "concrete": "UCI Concrete Compressive Strength (Yeh 1998), CC BY 4.0",
    "energy": "UCI Energy Efficiency, heating load (Tsanas and Xifara 2012), CC BY 4.0",
    "kin8nm": "Kin8nm, forward dynamics of a robot arm (DELVE), public",
    "power-plant": "UCI Combined Cycle Power Plant (Tufekci 2014), CC BY 4.0",
    "wine-quality-red": "UCI Wine Quality, red (Cortez et al. 2009), CC BY 4.0",
    "yacht": "UCI Yacht Hydrodynamics (Gerritsma et al. 1981), CC BY 4.0",
}

STREAMS = {
    "electricity": (
        DataFile("streams/elec.csv", "cdf901433885f29eca6911f70c0eeafb50d90596c879c30c5b99f5a2e8e734ff", 3200586),
        "Electricity (Elec2; Harries 1999), public",
    ),
    "weather": (
        DataFile("streams/weather.csv", "3c38f05bdc5c4cb115f122414c66976e3662c875d96d7199d9e47fc46aff150e", 772138),
        "NOAA weather, Bellevue, rain or not (Elwell and Polikar 2011), public",
    ),
}


def load(name: str, folder: str | Path | None = None) -> Dataset:
    """Images with classes, split into training and test examples.

    Args:
        name: ``"digits"`` (8 x 8; 1,297 + 500), ``"mnist"`` or ``"fashion-mnist"`` (28 x 28; 60,000 + 10,000);
            ``"cifar-10"``, ``"cifar-100"`` or ``"cifar-100-coarse"`` (its 20 superclasses; 32 x 32 x 3; 50,000 +
            10,000); ``"svhn"`` (32 x 32 x 3; 73,257 + 26,032); ``"notmnist"`` (28 x 28; the small set, some 16,850 + 1,870).
            Digits come with scikit-learn, need no file and no folder, and are split once and for all by a fixed seed.
            ``"cifar10_jpeg"`` is a lossy stand-in for ``"cifar-10"``, every image compressed by JPEG, for which no download
            is known; figures measured on it are figures of the stand-in.
        folder: the only data folder to look in; None looks in SSM_NN_DATA, in the cache, and then downloads.

    Returns:
        A Dataset: images float32 in [0, 1] of shape (N, H, W) or (N, H, W, 3), labels int32 of shape (N,).

    Raises:
        DataError: an unknown name; a missing, damaged or unreachable file.
    """
    if name == "digits":
        return _digits()
    if name in BYTE_IMAGES:
        read, num_classes, source = BYTE_IMAGES[name]
        images = read(folder)
        train_x, test_x = (_unit(pixels) for pixels in (images.train_x, images.test_x))
        return Dataset(name, train_x, images.train_y, test_x, images.test_y, num_classes, source)
    if name not in IMAGES:
        raise DataError(f"name is {name!r}; known data sets are {_listed(['digits', *IMAGES, *BYTE_IMAGES])}")
    files = IMAGES[name]
    return Dataset(
        name=name,
        train_x=_images(files.train_x, folder),
        train_y=_labels(files.train_y, folder),
        test_x=_images(files.test_x, folder),
        test_y=_labels(files.test_y, folder),
        num_classes=10,
        source=files.source,
    )


def load_regression(name: str, split: int = 0, folder: str | Path | None = None) -> Regression:
    """One of six UCI regression sets with a standard split (Hernandez-Lobato and Adams 2015), 90 % training examples.

    Args:
        name: ``"concrete"``, ``"energy"``, ``"kin8nm"``, ``"power-plant"``, ``"wine-quality-red"`` or ``"yacht"``.
        split: 0 ... 19.
        folder: the only data folder to look in; None looks in SSM_NN_DATA and in the cache. No download is known.

    Returns:
        A Regression: float32 inputs (N, D) and targets (N,), as in the file.

    Raises:
        DataError: an unknown name, a split outside 0 ... 19, a missing or damaged file.
    """
    if name not in REGRESSION:
        raise DataError(f"name is {name!r}; known regression sets are {_listed(REGRESSION)}")
    if not 0 <= split < NUM_REGRESSION_SPLITS:
        raise DataError(f"split is {split}; the standard splits are 0 to {NUM_REGRESSION_SPLITS - 1}")
    with tarfile.open(fileobj=io.BytesIO(read_file(REGRESSION_FILE, folder))) as archive:

        def table(file: str) -> np.ndarray:
            member = archive.extractfile(f"UCI_Datasets/{name}/data/{file}.txt")
            assert member is not None  # the checksum vouches for the archive
            return np.loadtxt(io.TextIOWrapper(member, encoding="ascii"))

        rows = table("data")
        inputs = rows[:, table("index_features").astype(int)].astype(np.float32)
        targets = rows[:, int(table("index_target"))].astype(np.float32)
        train, test = (table(f"index_{part}_{split}").astype(int) for part in ("train", "test"))
    return Regression(name, split, inputs[train], targets[train], inputs[test], targets[test], REGRESSION[name])


def load_stream(name: str, folder: str | Path | None = None) -> DriftStream:
    """A stream with concept drift, in the order of time: ``"electricity"`` (45,312 x 6) or ``"weather"`` (18,159 x 8).

    Args:
        name: one of the two.
        folder: the only data folder to look in; None looks in SSM_NN_DATA and in the cache. No download is known.

    Returns:
        A DriftStream: float32 inputs (N, D), int32 labels (N,) that are 0 or 1 (electricity: the price rises; weather:
        it rains).

    Raises:
        DataError: an unknown name, a missing or damaged file.
    """
    if name not in STREAMS:
        raise DataError(f"name is {name!r}; known streams are {_listed(STREAMS)}")
    file, source = STREAMS[name]
    header, *lines = csv.reader(io.StringIO(read_file(file, folder).decode("ascii")))
    rows = np.array(lines, np.float64)
    return DriftStream(
        name=name,
        x=rows[:, :-1].astype(np.float32),
        y=rows[:, -1].astype(np.int32),
        features=tuple(header[:-1]),
        num_classes=2,
        source=source,
    )


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    grey = (images / 16.0).astype(np.float32).reshape(-1, 8, 8)
    labels = labels.astype(np.int32)
    shuffled = np.random.default_rng(DIGITS_SPLIT_SEED).permutation(len(labels))
    train, test = shuffled[:NUM_DIGITS_TRAIN], shuffled[NUM_DIGITS_TRAIN:]
    source = "Optical Recognition of Handwritten Digits, UCI (Alpaydin and Kaynak 1998), with scikit-learn, CC BY 4.0"
    return Dataset("digits", grey[train], labels[train], grey[test], labels[test], 10, source)


def _images(file: DataFile, folder: str | Path | None) -> np.ndarray:
    return _unit(read_idx(read_file(file, folder)))


def _unit(pixels: np.ndarray) -> np.ndarray:
    """Bytes as float32 in [0, 1]."""
    values = pixels.astype(np.float32)
    values /= np.float32(255)
    return values


def _labels(file: DataFile, folder: str | Path | None) -> np.ndarray:
    return read_idx(read_file(file, folder)).astype(np.int32)


def read_idx(content: bytes) -> np.ndarray:
    """The uint8 array of an IDX file: bytes 0, 0, 8 (the type), the number of axes, the axes (big-endian), the values.

    Source: http://yann.lecun.com/exdb/mnist. Raises DataError where the header and the length disagree.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError("content is not an IDX file of unsigned bytes: it should start with 00 00 08 and the axes")
    axes = content[3]
    shape = np.frombuffer(content[4 : 4 + 4 * axes], ">u4").astype(int)
    values = np.frombuffer(content[4 + 4 * axes :], np.uint8)
    if values.size != np.prod(shape):
        raise DataError(f"content is an IDX file of shape {tuple(shape)} with {values.size} values; they should agree")
    return values.reshape(shape)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
