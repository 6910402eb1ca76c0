"""Markdown, read back for the tests: the tables of a text, and a card without its metadata."""

from __future__ import annotations


def markdown_rows(text: str) -> list[list[str]]:
    """Return the cells of every row of every table of a text, however wide its columns are set."""
    lines = [line.strip() for line in text.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def body(text: str) -> str:
    """Return a card without its metadata."""
    return text.split("---\n", 2)[2].strip()
