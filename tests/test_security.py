"""Loading what others wrote runs none of their code, writes nowhere, and reads nothing unverified."""

import ast
import importlib
import io
import os
import pickle
import pkgutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

import ssm_nn.models
from ssm_nn.inference.checkpoints import CheckpointError, load
from ssm_nn.inference.histories import OnDisk
from ssm_nn.models.cifar import read_batch, read_jpeg_folders
from ssm_nn.models.downloads import DataError, DataFile

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("ssm_nn", "models", "inference", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
]
# what runs code on loading, and the one file whose data set its publisher pickled: read by an unpickler that makes arrays only
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"}
# joblib deals calls out to its own processes; what it loads from files stays forbidden
DEALERS = {"joblib": {"Parallel", "delayed", "parallel_config"}}
PUBLISHED_PICKLES = {ROOT / "models" / "cifar.py"}


def nodes(path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        if {alias.name for alias in node.names} <= DEALERS.get(node.module, set()):
            return []
        return [node.module.split(".")[0]]
    return []


each_source = pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])


@each_source
def test_nothing_is_unpickled(path):
    if path not in PUBLISHED_PICKLES:
        assert not UNPICKLERS & {name for node in nodes(path) for name in imported(node)}
    for node in nodes(path):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle":
                    assert isinstance(keyword.value, ast.Constant)
                    assert keyword.value.value is False
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            assert not (isinstance(called, ast.Name) and name in {"eval", "exec", "compile", "__import__"}), name
            # unpacking to the disk goes where the archive says; members are read in memory instead
            assert name not in {"extractall", "unpack_archive", "system", "popen"}, name
            assert not any(keyword.arg == "shell" for keyword in node.keywords)


def test_the_unpickler_of_published_arrays_is_the_strict_one():
    for path in PUBLISHED_PICKLES:
        used = {
            node.attr
            for node in nodes(path)
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pickle"
        }
        assert used <= {"Unpickler", "UnpicklingError"}


def test_every_page_escapes_what_it_shows():
    for template in (ROOT / "ssm_nn").glob("*.jinja"):
        assert "safe" not in template.read_text().replace("unsafe", ""), template.name
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Environment":
                escaping = [keyword.value for keyword in node.keywords if keyword.arg == "autoescape"]
                assert [getattr(value, "value", None) for value in escaping] == [True], path.name


class Touch:
    """Pickled, it asks the reader to make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def malicious(tmp_path):
    """A checkpoint whose leaf is a pickle, and the file that it would make."""
    made, file = tmp_path / "made", tmp_path / "task-000000.npz"
    np.savez(
        file, leaf_0=np.array([Touch(made)], object), structure=np.array(Touch(made), object), sha256=np.array("0")
    )
    return file, made


def test_a_checkpoint_that_holds_a_pickle_is_refused_unread(malicious):
    file, made = malicious
    with pytest.raises(CheckpointError, match="cut short or altered"):
        load(file, {"x": jax.numpy.zeros(3)})
    assert not made.exists()


def test_a_history_that_holds_a_pickle_is_refused_unread(malicious):
    file, made = malicious
    history = OnDisk(file.parent)
    assert history.begin(lambda: {"x": jax.numpy.zeros(3)}, "a run") == 0
    assert not made.exists()
    assert not file.exists()


def test_a_batch_of_images_that_asks_for_a_function_is_refused(tmp_path):
    made = tmp_path / "made"
    with pytest.raises(DataError, match="asks for"):
        read_batch(pickle.dumps(Touch(made), protocol=2), "labels")
    assert not made.exists()


def test_an_archive_cannot_write_outside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name in ("../outside.txt", "/tmp/outside-of-ssm-nn.txt", "../train/cat/1.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"bad"))
        link = tarfile.TarInfo("train/cat/2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises((DataError, OSError, KeyError)):
        read_jpeg_folders(buffer.getvalue())
    assert os.listdir(tmp_path) == ["inside"]
    assert os.listdir(tmp_path / "inside") == []
    assert not Path("/tmp/outside-of-ssm-nn.txt").exists()


def test_every_file_that_can_be_downloaded_has_a_checksum():
    found = 0
    for module in pkgutil.iter_modules(ssm_nn.models.__path__):
        for value in vars(importlib.import_module(f"ssm_nn.models.{module.name}")).values():
            for file in value.values() if isinstance(value, dict) else [value]:
                if isinstance(file, DataFile):
                    found += 1
                    assert len(file.sha256) == 64 or len(file.md5) == 32, file.path
    assert found >= 10
