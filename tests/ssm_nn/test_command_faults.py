"""What can go wrong around a run: it is stopped, its files are damaged, the disk is full, two want one folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssm_nn import command_endings
from ssm_nn.command_endings import compiled_on_disk, of_the_file_system
from ssm_nn.command_folder import RunFolder
from ssm_nn.command_line import main
from ssm_nn.command_settings import CommandError
from ssm_nn.inference import checkpoints

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "tasks": 2, "labels": 12, "hidden": "none", "engine": "diagonal", "seeds": 1, "draws": 2, "noise": "last=0.5",
    "kernel": "walk",
}  # fmt: skip
TINY = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def invoke(*arguments):
    return CliRunner().invoke(main, list(arguments))


def begun(path, *arguments):
    """A run in a process of its own."""
    command = [sys.executable, "-c", "from ssm_nn.command_line import main; main()", *arguments, str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("faults") / "whole"
    result = invoke("run", *TINY, "--out", str(path))
    assert result.exit_code == 0, result.output
    return path


def interrupted(path, monkeypatch, after):
    """A run that Ctrl-C stops when checkpoint ``after`` (1, 2, ..) has been written."""
    written = []
    save = checkpoints.save

    def counted(file, tree):
        save(file, tree)
        written.append(file)
        if len(written) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ssm_nn.command_run.save", counted)
        result = invoke("run", *TINY, "--out", str(path), "--quiet")
    return result, written


def check_equal(path, whole):
    """Every metric to the last bit."""
    result = invoke("resume", str(path))
    assert result.exit_code == 0, result.output
    assert (path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    return result


def test_the_settings_say_where_and_with_what_a_run_was_made(whole):
    content = json.loads((whole / "settings.json").read_text())
    assert content["settings"]["seed"] == 0
    assert {"python", "jax", "devices", "precision"} <= set(content["versions"])
    assert content["versions"]["precision"] == "float32"


def test_ctrl_c_says_how_to_go_on(whole, tmp_path, monkeypatch):
    path = tmp_path / "run"
    result, _ = interrupted(path, monkeypatch, 3)
    assert result.exit_code == 130
    assert f"ssm-nn resume {path}" in result.output
    assert "Traceback" not in result.output
    check_equal(path, whole)


def test_a_run_that_is_terminated_ends_cleanly_and_says_how_to_go_on(tmp_path):
    path = tmp_path / "run"
    process = begun(path, "run", *TINY, "--quiet", "--out")
    while process.poll() is None and not (path / "settings.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143, said
    assert f"Go on with: ssm-nn resume {path}" in said
    assert "Traceback" not in said
    assert not list(path.rglob(".*.tmp"))


@pytest.mark.parametrize(
    "damage", [*(pytest.param(damage, marks=pytest.mark.slow) for damage in ("cut", "empty")), "altered"]
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_serves(whole, tmp_path, monkeypatch, damage):
    path = tmp_path / "run"
    _, written = interrupted(path, monkeypatch, 2)
    content = bytearray(written[-1].read_bytes())
    if damage == "altered":
        content[len(content) // 3] ^= 0xFF
    written[-1].write_bytes(content if damage == "altered" else content[: len(content) // 2 if damage == "cut" else 0])
    result = check_equal(path, whole)
    assert "was cut short or altered" in result.output


def test_a_full_disk_loses_nothing(whole, tmp_path, monkeypatch):
    path, written = tmp_path / "run", []
    save = checkpoints.save

    def full(file, tree):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        save(file, tree)
        written.append(file)

    with monkeypatch.context() as patch:
        patch.setattr("ssm_nn.command_run.save", full)
        result = invoke("run", *TINY, "--out", str(path), "--quiet")
    assert result.exit_code == 2
    assert "no space left" in result.output
    assert f"ssm-nn resume {path}" in result.output
    assert "Traceback" not in result.output
    check_equal(path, whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    result = invoke("run", *TINY, "--out", str(tmp_path / "run"))
    tmp_path.chmod(0o700)
    assert result.exit_code == 2
    assert "cannot be written" in result.output


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "there is no space left for runs/a; every finished task is saved"),
        (errno.EACCES, "runs/a/x cannot be written (Permission denied)"),
        (errno.EROFS, "cannot be written (Read-only file system)"),
        (errno.EIO, "runs/a/x: Input/output error"),
    ],
)
def test_what_the_file_system_refuses_is_a_sentence(number, words):
    error = OSError(number, os.strerror(number), "runs/a/x")
    sentence = of_the_file_system(error, Path("runs/a"), "ssm-nn resume runs/a")
    assert words in sentence
    assert sentence.endswith("go on with: ssm-nn resume runs/a")


def test_a_folder_in_use_is_refused(whole):
    with RunFolder(whole).claimed():
        result = invoke("resume", str(whole))
    assert result.exit_code == 2
    assert "in use by another ssm-nn" in result.output
    with RunFolder(whole).claimed(), pytest.raises(CommandError, match="in use"), RunFolder(whole).claimed():
        pass


def test_a_folder_is_free_again_when_its_process_is_killed(tmp_path):
    holder = (
        "import sys, time, pathlib; from ssm_nn.command_folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).claimed():\n    print('held', flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(CommandError, match="in use"), RunFolder(tmp_path).claimed():
        pass
    process.kill()
    process.communicate()
    with RunFolder(tmp_path).claimed():
        pass


def test_a_run_killed_before_its_settings_leaves_a_folder_that_may_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr("ssm_nn.command_run.Experiment.run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    path = tmp_path / "run"
    path.mkdir()
    (path / ".settings.json.7.tmp").write_text("{")
    assert invoke("run", *TINY, "--out", str(path)).exit_code == 130
    assert [file.name for file in path.iterdir()] == ["settings.json"]


def test_a_folder_of_somebody_elses_files_is_left_alone(tmp_path):
    (tmp_path / ".mine.tmp").write_text("precious")
    result = invoke("run", *TINY, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "is not an empty folder" in result.output
    assert (tmp_path / ".mine.tmp").read_text() == "precious"


def test_a_damaged_result_says_what_to_remove(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    array = path / "results" / "seed-0" / "chosen.npz"
    array.write_bytes(array.read_bytes()[:100])
    result = invoke("report", str(path))
    assert result.exit_code == 2
    assert "remove" in result.output
    assert "Traceback" not in result.output
    array.with_suffix(".json").unlink()
    check_equal(path, whole)


def test_compiled_programs_are_kept_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    import jax

    monkeypatch.setenv("SSM_NN_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with compiled_on_disk():
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
            jax.jit(lambda x: x * 7 + 3)(2.0).block_until_ready()
        assert (tmp_path / "compiled").stat().st_mode & 0o077 == 0
        (tmp_path / "compiled").chmod(0o777)
        with compiled_on_disk():
            assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_oldest_compiled_programs_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(command_endings, "_MOST_COMPILED", 250)
    for age in range(5):
        (tmp_path / f"program-{age}").write_bytes(bytes(100))
        os.utime(tmp_path / f"program-{age}", (1000 - age, 1000 - age))
    command_endings._trim(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["program-0", "program-1"]


def test_a_report_shows_hostile_text_and_does_not_run_it(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    content = json.loads((path / "settings.json").read_text())
    content["versions"]["jax"] = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    (path / "settings.json").write_text(json.dumps(content))
    assert invoke("report", str(path)).exit_code == 0
    page = (path / "report.html").read_text()
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page
