"""The README's first example runs as it is written."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_every_python_block_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    *evidence, accuracy = capsys.readouterr().out.split()
    assert evidence.count("evidence") == 4
    assert float(accuracy) > 0.6
