"""The whole site builds with every warning an error, and asks nothing of any other place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip(
        "mkdocs", reason="the group docs is not installed: uv run --group docs pytest -m slow tests/docs"
    )
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--plain-notebooks", "--to", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(
            r'(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href|<img[^>]*src)="(https?:[^"]*)', text
        )
        assert not fetched, f"{page.relative_to(tmp_path)} fetches {fetched}"
        assert "\\(" not in re.sub(r"<(code|pre)\b.*?</\1>", "", text, flags=re.DOTALL), f"a formula is left in {page}"
