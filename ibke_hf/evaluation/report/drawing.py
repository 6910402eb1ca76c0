"""How every figure looks and is saved: colours for light and dark pages, marks that do without colour, SVG and PNG.

Drawing needs matplotlib, the extra "plots"; it is imported when a figure is drawn. A reader's own settings have no
part in a figure, and the same data give the same SVG.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

TEXT, SMALL = 11.0, 9.5  # points
SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "ibke", "font.family": ["sans-serif"], "font.size": TEXT}
DOTS = 200  # of a PNG per inch


@dataclass(frozen=True)
class Theme:
    """The colours of a page.

    Attributes:
        name: ``"light"``, which also prints, or ``"dark"``.
        paper: Background.
        ink: Text and what is drawn first.
        faint: Text of axes.
        lines: Frames and grids.
        colours: For what is told apart, in this order; Okabe and Ito's, which colour-blind readers tell apart, each as
            light or dark as the page allows. Marks and line styles tell the same.
    """

    name: str
    paper: str
    ink: str
    faint: str
    lines: str
    colours: tuple[str, ...]


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1a1c1f",
    "#5b616b",
    "#b9bfc9",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#56b4e9", "#1a1c1f", "#6b7280"),
)
DARK = Theme(
    "dark",
    "#14171c",
    "#eceef1",
    "#a9b0bb",
    "#4a515c",
    ("#56b4e9", "#f0883e", "#2fc79a", "#e39bc4", "#e6c229", "#8fb8ff", "#eceef1", "#9aa1ac"),
)
THEMES = (LIGHT, DARK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


def require_plots() -> None:
    """Check that plots can be drawn, which a long run does before it starts.

    Raises:
        ImportError: If the extra "plots" is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('the plot needs the extra "plots": pip install "ibke-hf[plots]"') from error


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Draw and save figures by our own settings alone, in the colours of a page."""
    require_plots()
    import matplotlib

    colours = {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.lines,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "savefig.facecolor": theme.paper,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own settings would make another figure
        settings: Any = {**SETTINGS, **colours}
        matplotlib.rcParams.update(settings)
        yield


def svg_of(figure: Any) -> str:
    """Return a figure as SVG whose texts are texts; to be called within :func:`drawing`."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]  # without the document type, for which some readers ask the network


def png_of(figure: Any) -> bytes:
    """Return a figure as PNG; to be called within :func:`drawing`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS, metadata={"Software": None})
    return file.getvalue()
