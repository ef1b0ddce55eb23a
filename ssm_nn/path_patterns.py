"""Leaves chosen by patterns of their dotted paths: every leaf by exactly one pattern, every pattern used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

__all__ = ["assign"]


def assign[Value](
    patterns: Mapping[str, Value], paths: Sequence[str], what: str, otherwise: Value | None = None
) -> dict[str, Value]:
    """Give each path the value of the one pattern that it fits (shell-style: ``"layers.0.*"``).

    Args:
        patterns: value by pattern.
        paths: the dotted paths of all leaves.
        what: the argument's name, for errors.
        otherwise: value of the paths that no pattern fits; None makes such a path an error.

    Raises:
        ValueError: if a pattern fits no path, or a path fits no pattern or several.
    """
    chosen: dict[str, Value] = {}
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"{what}: no weights match the pattern {pattern!r}; the paths are {', '.join(paths)}")
    for path in paths:
        hits = [pattern for pattern in patterns if fnmatchcase(path, pattern)]
        if len(hits) > 1:
            raise ValueError(
                f"{what}: {path!r} matches several patterns, {', '.join(map(repr, hits))}; it must match one"
            )
        if not hits and otherwise is None:
            raise ValueError(f"{what}: {path!r} matches none of {', '.join(map(repr, patterns))}; every leaf needs one")
        chosen[path] = patterns[hits[0]] if hits else otherwise  # type: ignore[assignment]
    return chosen
