"""What the data sets hold, and what is said where they cannot be had."""

import gzip
import shutil

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ssm_nn.models.datasets import REGRESSION, load, load_regression, load_stream, read_idx
from ssm_nn.models.downloads import DataError


@pytest.mark.parametrize(
    ("name", "image", "num_train", "num_test"),
    [("digits", (8, 8), 1297, 500), ("mnist", (28, 28), 60000, 10000), ("fashion-mnist", (28, 28), 60000, 10000)],
)
def test_images_have_the_stated_shapes_and_ranges(name, image, num_train, num_test, request):
    folder = None if name == "digits" else request.getfixturevalue("data_folder")
    data = load(name, folder)
    for x, y, size in ((data.train_x, data.train_y, num_train), (data.test_x, data.test_y, num_test)):
        assert x.shape == (size, *image)
        assert y.shape == (size,)
        assert (x.dtype, y.dtype) == (np.float32, np.int32)
        assert (x.min(), x.max()) == (0.0, 1.0)
        assert np.array_equal(np.unique(y), np.arange(data.num_classes))


def test_digits_are_those_of_scikit_learn_each_once_on_one_side():
    data = load("digits")
    ours = np.concatenate([data.train_x, data.test_x]).reshape(-1, 64) * 16
    labels = np.concatenate([data.train_y, data.test_y])
    pixels, theirs = load_digits(return_X_y=True)

    def sorted_rows(x, y):
        rows = np.column_stack([x, y])
        return rows[np.lexsort(rows.T)]

    np.testing.assert_array_equal(sorted_rows(ours, labels), sorted_rows(pixels, theirs))


def test_digits_are_split_the_same_way_every_time_and_mixed():
    first, again = load("digits"), load("digits")
    np.testing.assert_array_equal(first.train_y, again.train_y)
    # A fixed split that a change of the seed or of the split would break.
    assert first.train_y[:8].tolist() == [6, 6, 6, 2, 5, 6, 6, 2]
    assert np.bincount(first.test_y).min() > 35


def test_mnist_is_read_in_the_right_order(data_folder):
    data = load("mnist", data_folder)
    assert data.train_y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as printed in every tutorial
    with gzip.open(data_folder / "mnist" / "t10k-images-idx3-ubyte.gz") as raw:
        raw.seek(16 + 7 * 784)
        eighth = np.frombuffer(raw.read(784), np.uint8)
    np.testing.assert_allclose(data.test_x[7].ravel() * 255, eighth, rtol=1e-6)


def test_a_damaged_copy_of_mnist_is_refused(data_folder, tmp_path):
    shutil.copytree(data_folder / "mnist", tmp_path / "mnist")
    labels = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    labels.chmod(0o644)
    content = bytearray(gzip.decompress(labels.read_bytes()))
    content[100] ^= 1
    labels.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz is not the expected file"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", sorted(REGRESSION))
def test_regression_splits_part_the_rows(name, data_folder):
    rows = {}
    for split in (0, 19):
        data = load_regression(name, split, data_folder)
        x, y = np.concatenate([data.train_x, data.test_x]), np.concatenate([data.train_y, data.test_y])
        assert (x.dtype, y.dtype) == (np.float32, np.float32)
        assert len(data.test_x) == pytest.approx(0.1 * len(x), abs=1)
        table = np.column_stack([x, y])
        rows[split] = table[np.lexsort(table.T)]
    np.testing.assert_array_equal(rows[0], rows[19])


def test_regression_columns_are_those_of_the_file(data_folder):
    data = load_regression("yacht", 0, data_folder)
    assert data.train_x.shape[1] == 6
    everything = np.column_stack([np.concatenate([data.train_x, data.test_x]), np.r_[data.train_y, data.test_y]])
    first_row = np.array([-2.3, 0.568, 4.78, 3.99, 3.17, 0.125, 0.11], np.float32)
    assert (everything == first_row).all(axis=1).sum() == 1


@pytest.mark.parametrize(
    ("name", "shape", "rate"), [("electricity", (45312, 6), 0.4245), ("weather", (18159, 8), 0.3138)]
)
def test_streams_keep_the_order_of_time(name, shape, rate, data_folder):
    stream = load_stream(name, data_folder)
    assert stream.x.shape == shape
    assert (stream.x.dtype, stream.y.dtype) == (np.float32, np.int32)
    assert len(stream.features) == shape[1]
    assert np.unique(stream.y).tolist() == [0, 1]
    assert stream.y.mean() == pytest.approx(rate, abs=1e-3)
    if name == "electricity":  # the period is the half hour of the day
        np.testing.assert_allclose(stream.x[:48, 0], np.arange(48) / 47, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load("mnits"), "name is 'mnits'; known data sets are 'digits', 'mnist', 'fashion-mnist'"),
        (lambda: load_regression("boston"), "name is 'boston'; known regression sets are 'concrete'"),
        (lambda: load_regression("yacht", 20), "split is 20; the standard splits are 0 to 19"),
        (lambda: load_stream("tides"), "name is 'tides'; known streams are 'electricity', 'weather'"),
    ],
)
def test_what_is_unknown_is_named_with_what_is_known(call, message):
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        b"\x00\x00\x0d\x01\x00\x00\x00\x01x",
        b"\x00\x00\x08\x01\x00\x00\x00\x05abc",
        b"\x00\x00\x08\x03\x00",
    ],
    ids=["empty", "no axes", "floats", "too few values", "header cut short"],
)
def test_a_malformed_idx_file_is_refused(content):
    with pytest.raises(DataError, match="IDX file"):
        read_idx(content)


def test_idx_axes_are_big_endian_and_row_major():
    content = b"\x00\x00\x08\x02" + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6))
    np.testing.assert_array_equal(read_idx(content), [[0, 1, 2], [3, 4, 5]])
