"""Build the documentation into build/site: `uv run --group docs python docs/build.py`.

Notebooks are executed, and their outputs kept in build/notebooks until they or the package change; with
`--plain-notebooks` none is executed. Every warning is an error; links are checked by MkDocs while it builds. Nothing is
fetched.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

CONFIG = Path(__file__).parent / "mkdocs.yml"


def main() -> None:
    """Build once, or serve while pages are written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plain = "do not execute notebooks; their pages show code alone"
    parser.add_argument("--plain-notebooks", action="store_true", help=plain)
    parser.add_argument("--serve", action="store_true", help="serve at 127.0.0.1:8000, and build on every change")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="of the built pages; by default build/site")
    given = parser.parse_args()
    if given.plain_notebooks:
        os.environ["SSM_NN_DOCS_NOTEBOOKS"] = "plain"
    os.environ.setdefault(
        "NO_MKDOCS_2_WARNING", "true"
    )  # of the theme: about a successor of MkDocs, not about these pages

    from mkdocs.__main__ import cli

    if given.serve:
        cli(["serve", "--config-file", str(CONFIG)])
    target = [] if given.to is None else ["--site-dir", str(given.to.resolve())]
    cli(["build", "--strict", "--clean", "--config-file", str(CONFIG), *target])


if __name__ == "__main__":
    main()
