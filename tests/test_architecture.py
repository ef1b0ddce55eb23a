"""The layout that the rest relies on: which folder imports which, and what is packaged."""

import ast
import fnmatch
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"ssm_nn": ROOT / "ssm_nn", "ssm_nn.models": ROOT / "models", "ssm_nn.inference": ROOT / "inference"}
LINKS = {ROOT / "ssm_nn" / "models": ROOT / "models", ROOT / "ssm_nn" / "inference": ROOT / "inference"}
MAX_LINES = 400


def files_of(package: str, pattern: str = "*") -> list[Path]:
    """The files of a package's folder, those behind the links and in caches left out."""
    found = FOLDERS[package].rglob(pattern)
    return sorted(
        path
        for path in found
        if path.is_file() and "__pycache__" not in path.parts and not any(link in path.parents for link in LINKS)
    )


SOURCES = [(package, path) for package in FOLDERS for path in files_of(package, "*.py")]
each_source = pytest.mark.parametrize(
    ("package", "path"), SOURCES, ids=[str(path.relative_to(ROOT)) for _, path in SOURCES]
)


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, anywhere in it; relative ones keep their dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # "from ssm_nn import models" imports ssm_nn.models
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@each_source
def test_imports_run_one_way(package, path):
    above = {
        "ssm_nn": ("ssm_nn.models", "ssm_nn.inference"),
        "ssm_nn.models": ("ssm_nn.inference",),
        "ssm_nn.inference": ("ssm_nn.models",),
    }[package]
    if package == "ssm_nn" and (path.name == "__init__.py" or path.name.startswith("command_")):
        return
    wrong = [module for module in imported_modules(path) if any(within(module, other) for other in above)]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@each_source
def test_imports_are_absolute_and_by_the_installed_name(package, path):
    wrong = [
        module
        for module in imported_modules(path)
        if module.startswith(".") or within(module, "models") or within(module, "inference")
    ]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}; write ssm_nn.models or ssm_nn.inference"


@each_source
def test_files_are_short(package, path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines; at most {MAX_LINES} are wanted"


@each_source
def test_no_file_is_a_drawer_of_odds_and_ends(package, path):
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}


def test_packages_of_pyproject_are_complete():
    """setuptools leaves out a package that is not listed, without a word."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    in_tree = {
        ".".join([package, *path.parent.relative_to(FOLDERS[package]).parts])
        for package in FOLDERS
        for path in files_of(package, "*.py")
    }
    assert set(settings["packages"]) == in_tree
    assert settings["package-dir"] == {package: str(folder.relative_to(ROOT)) for package, folder in FOLDERS.items()}


def test_package_data_covers_every_other_file():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package, folder in FOLDERS.items():
        patterns = settings["package-data"].get(package, [])
        for path in files_of(package):
            name = str(path.relative_to(folder))
            covered = path.suffix == ".py" or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            assert covered, f"{name} of {package} is not in tool.setuptools.package-data and would not be installed"


def test_the_links_lead_to_the_folders():
    for link, folder in LINKS.items():
        assert link.is_symlink(), f"{link.relative_to(ROOT)} should be a link to ../{folder.name}"
        assert link.readlink() == Path("..") / folder.name


def test_tests_are_no_packages():
    """With __init__.py, tests/models would be imported as a package of its own."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
