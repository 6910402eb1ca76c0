"""Rows of texts as a table for a terminal or in Markdown, by the library tabulate."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a table for a terminal.

    Args:
        heads: Titles of the columns.
        rows: Their texts, as many in each row as there are titles.
        left: Number of leading columns that are set to the left; the others, numbers, are set to the right.
    """
    return _table("simple", heads, rows, left)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a table in Markdown, see :func:`text_table`; the texts are Markdown already."""
    return _table("pipe", heads, rows, left)


def _table(style: str, heads: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    sides = ["left" if i < left else "right" for i in range(len(heads))]
    # Without rows tabulate takes no alignment; the texts are not to be read as numbers, which would be written anew.
    alignment = {"colalign": sides} if rows else {}
    table = tabulate([list(row) for row in rows], list(heads), tablefmt=style, disable_numparse=True, **alignment)
    return "\n".join(line.rstrip() for line in table.splitlines())
