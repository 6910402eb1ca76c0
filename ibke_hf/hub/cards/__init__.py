"""`ibke card`: the cards under ``model_cards/``, and the card that a push of an editor writes, from one template.

The template is :func:`ibke_hf.hub.cards.editor.editor_page`.
"""

from __future__ import annotations

from pathlib import Path

from ...core.configuration_ibke import PRESETS
from ...io import write_text

ATLAS = "atlas"
BACKBONES = {backbone.rpartition("/")[2].lower(): backbone for backbone in PRESETS}  # by the name of their card
REAL = ("smollm2-135m-instruct",)  # whose weights and measurements lie in the card's folder
CARDS = (ATLAS, *REAL, *BACKBONES)


def render_card(name: str, out: str | Path = "model_cards") -> dict[str, str]:
    """Return the files of one of `CARDS` by path: ``README.md``, and ``.eval_results/*.yaml`` where there are results.

    Args:
        name: The card.
        out: Folder of the cards, where the figures of the card of a real model lie.

    Raises:
        ValueError: For another name; lists those that there are.
    """
    if name == ATLAS:
        from .atlas import atlas_card

        return atlas_card()
    if name in REAL:
        from .real import real_card

        return real_card(name, Path(out) / name)
    from .presets import preset_card

    return preset_card(name, backbone_of(name))


def backbone_of(name: str) -> str:
    """Return the backbone of a card whose editor is not trained yet.

    Raises:
        ValueError: For a name that is none; lists those that there are.
    """
    if name not in BACKBONES:
        raise ValueError(f"no card {name!r}; the cards are {', '.join(CARDS)}")
    return BACKBONES[name]


def write_card(name: str, out: str | Path) -> list[Path]:
    """Write the files of a card to a folder of its name under `out`, each whole or not at all; return their paths.

    Raises:
        ValueError: For a name that is none.
    """
    written = []
    for path, text in render_card(name, out).items():
        file = Path(out) / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
        written.append(file)
    return written


def stale_files(name: str, out: str | Path) -> list[Path]:
    """Return the files of a card under `out` that are not what is rendered now.

    Raises:
        ValueError: For a name that is none.
    """
    files = {Path(out) / name / path: text for path, text in render_card(name, out).items()}
    return [file for file, text in files.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
