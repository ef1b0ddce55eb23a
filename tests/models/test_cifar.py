"""CIFAR from archives of the original formats, small ones made here, and from the JPEG stand-in."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from ssm_nn.models import cifar, datasets
from ssm_nn.models.cifar import CLASSES, cifar_jpeg, read_batch, read_jpeg_folders
from ssm_nn.models.datasets import load
from ssm_nn.models.downloads import DataError, DataFile


class _OfPython2:
    """Pickles as Python 2 wrote an array: flags of the dtype as 0 and 1, modules under their old names."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        reconstruct, arguments, state = self.array.__reduce__()
        return reconstruct, arguments, (*state[:2], _OldType(), *state[3:])


class _OldType:
    def __reduce__(self):
        return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)


def batch(rng, num, first=0, **labels):
    """A pickled batch whose image n is random but for its first red pixel, which is first + n."""
    rows = rng.integers(0, 256, (num, 3072)).astype(np.uint8)
    rows[:, 0] = first + np.arange(num)
    content = {b"data": _OfPython2(rows)} | {name.encode(): values for name, values in labels.items()}
    return rows, pickle.dumps(content, protocol=2)


def archive(members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def put(folder, file, content, monkeypatch, **checksum):
    """Lay ``content`` where the data file lies, and let its checksum be expected."""
    place = file.under(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    name = next(key for key, value in vars(cifar).items() if value is file)
    changed = DataFile(file.path, size=len(content), **checksum)
    monkeypatch.setattr(cifar, name, changed)
    monkeypatch.setattr(datasets, name, changed, raising=False)
    return place


def test_planes_of_red_green_and_blue_become_the_last_axis(rng):
    rows, content = batch(rng, 4, labels=[3, 1, 4, 1])
    x, y = read_batch(content, "labels")
    assert (x.shape, x.dtype, y.dtype, y.tolist()) == ((4, 32, 32, 3), np.uint8, np.int32, [3, 1, 4, 1])
    for n, row, column, channel in rng.integers(0, [4, 32, 32, 3], (50, 4)):
        assert x[n, row, column, channel] == rows[n, 1024 * channel + 32 * row + column]


def test_cifar_10_joins_its_batches_in_order(rng, tmp_path, monkeypatch):
    members, first = {}, 0
    for n in (3, 1, 5, 2, 4):  # an archive may hold them in any order
        _, content = batch(rng, 2, first=10 * n, labels=[n, n])
        members[f"cifar-10-batches-py/data_batch_{n}"] = content
    _, members["cifar-10-batches-py/test_batch"] = batch(rng, 3, first=200, labels=[0, 9, 8])
    members["cifar-10-batches-py/batches.meta"] = pickle.dumps({b"label_names": []}, protocol=2)
    members["cifar-10-batches-py/readme.html"] = b"<html>"
    packed = archive(members)
    put(tmp_path, cifar.CIFAR10_FILE, packed, monkeypatch, md5=hashlib.md5(packed).hexdigest())
    data = load("cifar-10", tmp_path)
    assert data.train_y.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert data.test_y.tolist() == [0, 9, 8]
    assert (data.train_x.shape, data.train_x.dtype, data.num_classes) == ((10, 32, 32, 3), np.float32, 10)
    assert 0 <= data.train_x.min() <= data.train_x.max() <= 1
    first = [10, 11, 20, 21, 30, 31, 40, 41, 50, 51]
    np.testing.assert_array_equal(np.rint(data.train_x[:, 0, 0, 0] * 255), first)


@pytest.mark.parametrize(
    ("name", "labels", "classes"), [("cifar-100", [7, 99], 100), ("cifar-100-coarse", [2, 19], 20)]
)
def test_cifar_100_has_fine_and_coarse_labels(name, labels, classes, rng, tmp_path, monkeypatch):
    members = {
        f"cifar-100-python/{part}": batch(rng, 2, fine_labels=[7, 99], coarse_labels=[2, 19])[1]
        for part in ("meta", "test", "train")
    }
    packed = archive(members)
    put(tmp_path, cifar.CIFAR100_FILE, packed, monkeypatch, md5=hashlib.md5(packed).hexdigest())
    data = load(name, tmp_path)
    assert data.train_y.tolist() == data.test_y.tolist() == labels
    assert data.num_classes == classes
    assert len(data.train_x) == 2


def test_an_archive_with_another_md5_is_refused(rng, tmp_path):
    place = cifar.CIFAR10_FILE.under(tmp_path)
    place.parent.mkdir(parents=True)
    place.write_bytes(archive({"cifar-10-batches-py/test_batch": batch(rng, 1, labels=[0])[1]}))
    with pytest.raises(DataError, match=r"is not the expected file: md5 .* instead of c58f30108f71"):
        load("cifar-10", tmp_path)


class _Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            pickle.dumps({b"data": _Harmful(), b"labels": []}, protocol=2),
            "a batch of CIFAR holds arrays, lists and bytes",
        ),
        (pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]}, protocol=2), r"uint8 \(N, 3072\)"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, protocol=2), "and 1 labels"),
        (
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}, protocol=2),
            r"no batch of CIFAR with 'labels' \(KeyErr",
        ),
        (b"", r"no batch of CIFAR with 'labels' \(EOFError"),
        (b"nothing of the kind", "no batch of CIFAR with 'labels'"),
    ],
)
def test_what_is_no_batch_is_refused_and_nothing_in_it_runs(content, message, capsys):
    with pytest.raises(DataError, match=message):
        read_batch(content, "labels")
    assert not capsys.readouterr().out


def jpeg(colour, side=32) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), colour, np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def small_folders() -> dict[str, bytes]:
    members = {"README.md": b"text", "train/airplane/note.txt": b"text"}
    for part, numbers in (("train", (1, 0)), ("test", (0,))):
        for k in (9, 0, 4):
            for n in numbers:
                members[f"{part}/{CLASSES[k]}/{n:04}.jpg"] = jpeg((20 * k, 100 * n, 7))
    return members


def test_folders_of_jpeg_files_are_read_by_class_and_number():
    images = read_jpeg_folders(archive(small_folders(), "w:xz"))
    assert images.train_y.tolist() == [0, 0, 4, 4, 9, 9]
    assert images.test_y.tolist() == [0, 4, 9]
    expected = np.array([[0, 0, 7], [0, 100, 7], [80, 0, 7], [80, 100, 7], [180, 0, 7], [180, 100, 7]])
    assert np.abs(images.train_x[:, 16, 16].astype(int) - expected).max() <= 3  # it is lossy
    assert images.train_x.dtype == np.uint8


def test_the_stand_in_is_decoded_once_and_a_damaged_copy_again(tmp_path, monkeypatch):
    packed = archive(small_folders(), "w:xz")
    put(tmp_path / "data", cifar.JPEG_FILE, packed, monkeypatch, sha256=hashlib.sha256(packed).hexdigest())
    monkeypatch.setenv("SSM_NN_CACHE", str(tmp_path / "cache"))
    calls = []
    decode = read_jpeg_folders
    monkeypatch.setattr(cifar, "read_jpeg_folders", lambda content: calls.append(1) or decode(content))
    first = cifar_jpeg(tmp_path / "data")
    for expected in (1, 1):
        again = cifar_jpeg(tmp_path / "data")
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert len(calls) == expected
    copy = tmp_path / "cache" / "cifar10_jpeg" / "decoded.npz"
    assert sorted(path.name for path in copy.parent.iterdir()) == ["decoded.npz", "decoded.sha256"]
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(bytes(content))
    again = cifar_jpeg(tmp_path / "data")
    assert len(calls) == 2
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    (copy.parent / "decoded.sha256").unlink()
    cifar_jpeg(tmp_path / "data")
    assert len(calls) == 3
    # another archive, properly verified, is not answered with the copy of this one
    other = archive({name: content for name, content in small_folders().items() if "truck" not in name}, "w:xz")
    put(tmp_path / "data", cifar.JPEG_FILE, other, monkeypatch, sha256=hashlib.sha256(other).hexdigest())
    assert cifar_jpeg(tmp_path / "data").train_y.tolist() == [0, 0, 4, 4]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"train/zebra/0000.jpg": jpeg(0)}, "content holds train/zebra/0000.jpg; train or test, one of airplane"),
        ({"train/cat/0000.jpg": jpeg(0, 16)}, r"train/cat/0000.jpg of shape \(16, 16, 3\); \(32, 32, 3\) is expected"),
        ({"train/cat/0000.jpg": jpeg(0)}, "content holds no image test/<class>/<number>.jpg"),
    ],
)
def test_other_folders_are_refused(members, message):
    with pytest.raises(DataError, match=message):
        read_jpeg_folders(archive(members, "w:xz"))


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    packed = archive(small_folders(), "w:xz")
    put(tmp_path, cifar.JPEG_FILE, packed, monkeypatch, sha256=hashlib.sha256(packed).hexdigest())
    (tmp_path / "occupied").write_text("a file where the folder should be")
    monkeypatch.setenv("SSM_NN_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(DataError, match=r"cannot be written .* SSM_NN_CACHE"):
        cifar_jpeg(tmp_path)


@pytest.mark.slow
def test_the_whole_stand_in(data_folder):
    data = load("cifar10_jpeg", data_folder)
    assert (data.train_x.shape, data.test_x.shape) == ((50000, 32, 32, 3), (10000, 32, 32, 3))
    assert np.bincount(data.train_y).tolist() == [5000] * 10
    assert np.bincount(data.test_y).tolist() == [1000] * 10
    assert "lossy stand-in" in data.source
    # the channel means of the original that are quoted everywhere
    np.testing.assert_allclose(data.train_x.mean((0, 1, 2), np.float64), [0.4914, 0.4822, 0.4465], atol=2e-3)
