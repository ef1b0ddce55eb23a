"""The documentation's sources: every page is in the navigation, every link leads somewhere, every block of code runs."""

import ast
import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = DOCS / "pages"
sys.path.insert(0, str(DOCS))

import api_pages  # noqa: E402
import result_pages  # noqa: E402

WRITTEN = {str(path.relative_to(PAGES)): path.read_text(encoding="utf-8") for path in sorted(PAGES.rglob("*.md"))}
NOTEBOOKS = {f"notebooks/{path.stem}.md": "" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
MADE = {place: text for made in (api_pages.pages(), result_pages.pages()) for place, text in made.items()}
ALL = {**WRITTEN, **NOTEBOOKS, **{place: text for place, text in MADE.items() if isinstance(text, str)}}

LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# what a front matter says of a page whose examples take longer than a few seconds
SLOW = "examples: slow"


def named_in(navigation):
    for entry in navigation:
        for value in [entry] if isinstance(entry, str) else entry.values():
            yield from [value] if isinstance(value, str) else named_in(value)


def anchors_of(text):
    """As Python-Markdown makes them, of titles without markup."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def python_blocks(text):
    return [code for language, code in BLOCK.findall(text) if language == "python"]


def test_every_page_is_in_the_navigation_once():
    settings = yaml.safe_load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [place for place in named_in(settings["nav"]) if place != "notebooks/*.md"]
    assert sorted([*named, *NOTEBOOKS]) == sorted(ALL)


@pytest.mark.parametrize("place", WRITTEN)
def test_every_internal_link_leads_to_a_page_and_a_heading(place):
    for target in LINK.findall(BLOCK.sub("", WRITTEN[place])):
        assert not target.startswith(("http:", "/")), f"{target}: pages are read offline, links are relative"
        if target.startswith("https:"):
            continue
        path, _, anchor = target.partition("#")
        there = (PAGES / place).parent.joinpath(path).resolve() if path else PAGES / place
        name = str(there.relative_to(PAGES.resolve()))
        assert name in ALL or there.exists(), f"{place} links to {target}, which is no page"
        if anchor:
            assert anchor in anchors_of(ALL[name]), f"{place} links to {target}, which has no such heading"


@pytest.mark.parametrize("place", WRITTEN)
def test_fences_close_and_name_a_language(place):
    fences = re.findall(r"^```(.*)$", WRITTEN[place], flags=re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= {"python", "console"}
    assert set(fences[1::2]) <= {""}


def test_whatever_an_example_imports_is_there():
    for place, text in WRITTEN.items():
        for block in python_blocks(text):
            tree = ast.parse(block, place)
            imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), place, "exec"), {})


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(place, marks=[pytest.mark.slow] if SLOW in text.split("\n# ")[0] else [])
        for place, text in WRITTEN.items()
        if python_blocks(text)
    ],
)
def test_the_examples_of_a_page_run_one_after_another(place):
    names: dict[str, object] = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in python_blocks(WRITTEN[place]):
            exec(compile(block, place, "exec"), names)


def test_every_name_of_a_facade_is_documented_and_every_module_of_models_is():
    modules = [module for page in api_pages.PAGES.values() for module in page.modules]
    assert len(modules) == len(set(modules))
    facades = {"ssm_nn", "ssm_nn.models", "ssm_nn.inference"}
    facades |= {f"ssm_nn.inference.{path.parent.name}" for path in (ROOT / "inference").glob("*/__init__.py")}
    assert facades <= set(modules)
    # the parts of a stream, and what models.streams gathers from elsewhere
    hidden = {"stream_making", "streams", "transitions"}
    assert {
        f"ssm_nn.models.{path.stem}" for path in (ROOT / "models").glob("[a-z]*.py") if path.stem not in hidden
    } <= set(modules)
    for place, page in api_pages.PAGES.items():
        for module, names in api_pages.names_of(page).items():
            assert all(f"::: {module}.{name}\n" in f"{ALL[f'api/{place}.md']}\n" for name in names)


def test_every_summary_of_results_is_on_a_page():
    shown = "".join(text for place, text in ALL.items() if place.startswith("results/"))
    for path in (ROOT / "benchmarks" / "results").glob("*/*-summary.csv"):
        assert f"`{path.relative_to(ROOT)}`" in shown, f"{path.name} is on no page of results"


def test_a_table_joins_spreads_and_leaves_out_what_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(result_pages, "ROOT", tmp_path)
    path = tmp_path / "a.csv"
    path.write_text("data,method,score,score_sd,empty,count\nx,one|two,0.91234,0.0123,,12345\nx,b,0.5,nan,,7\n")
    assert result_pages.table(path) == [
        "| method | score | count |",
        "|---|---:|---:|",
        "| one\\|two | 0.912 ± 0.012 | 12,345 |",
        "| b | 0.5 | 7 |",
        "",
        "In all rows: data x.",
    ]
    with pytest.raises(ValueError, match=r"a\.csv has no rows to show"):
        result_pages.table(path, lambda row: False)
