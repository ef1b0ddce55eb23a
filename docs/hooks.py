"""MkDocs hooks: the pages that are made and not written, and formulas as MathML.

MathML is drawn by the browser itself, so that the pages need no script from anywhere.
"""

from __future__ import annotations

import html
import os
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file by its path

import api_pages
import notebook_pages
import result_pages

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every notebook into the navigation."""
    places = [f"notebooks/{path.stem}.md" for path in notebook_pages.notebooks()]
    config.nav = [{"Notebooks": places} if "Notebooks" in entry else entry for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages to those under ``pages``."""
    executed = os.environ.get("SSM_NN_DOCS_NOTEBOOKS") != "plain"
    made: dict[str, str | bytes] = {**api_pages.pages(), **result_pages.pages(), **notebook_pages.pages(executed)}
    for place, content in made.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_content(markup: str, **given: Any) -> str:
    """Every formula as MathML."""
    page = given["page"]

    def drawn(found: re.Match[str]) -> str:
        try:
            made = convert(html.unescape(found[3]).strip(), display="block" if found[2] == "[" else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: the formula {found[3]!r} cannot be read: {error}") from error
        if "\\" in html.unescape(made):  # a command that was not understood
            raise PluginError(
                f"{page.file.src_uri}: the formula {found[3]!r} holds a command that has no MathML: {made}"
            )
        return made

    return FORMULA.sub(drawn, markup)
