"""Tables of Markdown, read back for the tests."""

from __future__ import annotations


def markdown_rows(text: str) -> list[list[str]]:
    """Return the cells of every row of every table of a text, however wide its columns are set."""
    lines = [line.strip() for line in text.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
