"""A task for each data set, and the two loaders that only the five data sets need, on small files of their formats."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ssm_nn.models import datasets, not_mnist, svhn
from ssm_nn.models.cifar import ByteImages
from ssm_nn.models.data_set_stream import FIVE, in_colour, of_data_sets
from ssm_nn.models.datasets import Dataset, load
from ssm_nn.models.downloads import DataError


def made(name, rng, shape, classes=10, num=30):
    x = rng.uniform(size=(num, *shape)).astype(np.float32)
    y = rng.integers(0, classes, num).astype(np.int32)
    return Dataset(name, x, y, x[:12], y[:12], classes, "made here")


def test_a_task_is_a_data_set_in_colour_whatever_the_order(rng):
    grey, colour = made("grey", rng, (27, 28)), made("colour", rng, (32, 32, 3))
    stream = of_data_sets([grey, colour], order=[1, 0], train_size=20)
    assert [int(stream.train[t].context["task"]) for t in range(2)] == [1, 0]
    natural = of_data_sets([grey, colour], train_size=20)
    for t, k in enumerate([1, 0]):
        assert np.array_equal(stream.train[t]["x"], natural.train[k]["x"])
        assert stream.train[t]["x"].shape == (20, 32, 32, 3)
        assert stream.test[t]["x"].shape == (12, 32, 32, 3)
    assert stream.input_shape == (32, 32, 3)
    task = natural.train[0]
    for image, label in zip(task["x"], task["y"], strict=True):
        assert np.array_equal(image[..., 0], image[..., 2])
        inner = image[2:29, 2:30, 1]
        assert image.sum() == pytest.approx(3 * inner.sum(), rel=1e-5)
        (row,) = np.flatnonzero((grey.train_x == inner).all((1, 2)))
        assert grey.train_y[row] == label
    flat = of_data_sets([grey, colour], flatten=True)
    assert flat.train[0]["x"].shape == (30, 3072)


def test_images_of_the_size_are_not_framed(rng):
    x = rng.uniform(size=(2, 32, 32, 3))
    assert np.array_equal(in_colour(x, 32), x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"datasets": []}, "datasets have no classes"),
        ({"classes": 3}, "datasets have {'one': 10, 'two': 3} classes"),
        ({"side": 20}, "side is 20; one has images of"),
        ({"train_size": 31}, "train_size is 31"),
        ({"order": [0, 0]}, "order is"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_arguments_are_named(rng, change, words):
    change = dict(change)
    both = [made("one", rng, (28, 28)), made("two", rng, (28, 28), change.pop("classes", 10))]
    with pytest.raises(ValueError, match=words):
        of_data_sets(change.pop("datasets", both), **change)


def matlab(images, labels):
    buffer = io.BytesIO()
    savemat(buffer, {"X": images, "y": labels})
    return buffer.getvalue()


def test_house_numbers_are_read_with_ten_as_zero(rng):
    images = rng.integers(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    x, y = svhn.read_mat(matlab(images, np.array([[10], [1], [9], [10]], np.uint8)))
    assert y.tolist() == [0, 1, 9, 0]
    assert np.array_equal(x[2], images[..., 2])
    for content, words in (
        (b"nothing", "no MATLAB file"),
        (matlab(images[:30], np.ones((4, 1))), "content holds X uint8"),
        (matlab(images, np.array([[0], [1], [2], [3]])), "labels"),
    ):
        with pytest.raises(DataError, match=words):
            svhn.read_mat(content)


def letters(names, side=28, broken=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, name in enumerate(names):
            image = io.BytesIO()
            Image.fromarray(np.full((side, side), number, np.uint8)).save(image, "PNG")
            archive.writestr(f"notMNIST_small/{name}.png", b"" if name in broken else image.getvalue())
    return buffer.getvalue()


def test_letters_are_read_and_every_tenth_is_a_test_image(monkeypatch):
    names = [f"{letter}/{n:02d}" for letter in "JABCDEFGHI" for n in range(12)]
    packed = letters(names, broken=("A/03",))
    x, y = not_mnist.read_letters(packed)
    assert np.bincount(y).tolist() == [11] + [12] * 9
    assert [int(image[0, 0]) for image in x[:4]] == [names.index(f"A/{n:02d}") for n in (0, 1, 2, 4)]
    monkeypatch.setattr(not_mnist, "read_file", lambda file, folder: packed)
    found = not_mnist.not_mnist()
    assert isinstance(found, ByteImages)
    assert found.test_y.tolist() == [letter for letter in range(10) for _ in range(2)]
    assert len(found.train_y) + len(found.test_y) == 119
    for content, words in (
        (b"nothing", "no zip file"),
        (letters(["A/0"]), "every letter"),
        (letters(names, 27), "shape"),
    ):
        with pytest.raises(DataError, match=words):
            not_mnist.read_letters(content)


def test_the_five_are_known_by_name(tmp_path):
    for name in FIVE:
        with pytest.raises(DataError, match="is missing"):
            load(name, tmp_path)
    with pytest.raises(DataError, match="svhn"):
        load("nothing")
    assert set(FIVE) <= {*datasets.IMAGES, *datasets.BYTE_IMAGES}


def test_tasks_of_the_real_files(data_folder):
    both = [load(name, data_folder) for name in ("mnist", "fashion-mnist")]
    stream = of_data_sets(both, train_size=500, test_size=100)
    assert stream.train[1]["x"].shape == (500, 32, 32, 3)
    assert float(stream.train[1]["x"].max()) == 1.0
