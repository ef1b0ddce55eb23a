"""A griffe extension: ``height, width: of the image`` in a docstring describes both arguments.

Griffe takes what stands before the colon as one name, and would warn that no argument is called so.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SHARED = re.compile(r"^(?P<indent>\s+)(?P<names>\w+(?:, \w+)+): (?P<text>.*)$")


class SharedDescriptions(griffe.Extension):
    """Gives every name of a list its own entry, with the same text."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of whatever was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(spread(obj.docstring.value.splitlines()))


def spread(lines: list[str]) -> list[str]:
    """The lines with each shared entry, and the lines that go on below it, repeated by name."""
    made, place, inside = [], 0, False
    while place < len(lines):
        line = lines[place]
        inside = line.strip() == "Args:" or (inside and (not line.strip() or line.startswith(" ")))
        found = SHARED.match(line) if inside else None
        place += 1
        if found is None:
            made.append(line)
            continue
        further = []
        while place < len(lines) and lines[place].startswith(f"{found['indent']} "):
            further.append(lines[place])
            place += 1
        for name in found["names"].split(", "):
            made += [f"{found['indent']}{name}: {found['text']}", *further]
    return made
