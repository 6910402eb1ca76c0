"""The editors by their ids: IBKE and what the paper compares it with (Table II)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Kind:
    """What kind of editor an id stands for.

    Attributes:
        title: As the paper writes it, and for IBKE whose network it is: the paper's plain one, or the one that its
            config asks for, which on Atlas has a skip, an MLP and four heads that are ours.
        module: Where its class is, relative to this package; empty for the unedited model.
        class_name: Its class.
        trained: Whether it has weights, which are trained on edit records (the paper's ET; the others are its DE).
        several_layers: Whether it edits any number of layers; the others have one, or none.
        needs_statistics: Whether it is built with the :class:`~ibke_hf.editors.locate.key_statistics.KeyStatistics` of
            a corpus.
        variant_of: Id of the editor whose class and recipe it shares; empty for an editor of its own.
        settings: Fields of its config that make it this variant.
    """

    title: str
    module: str = ""
    class_name: str = ""
    trained: bool = False
    several_layers: bool = False
    needs_statistics: bool = False
    variant_of: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "none": Kind("W/O"),
    "ft": Kind("FT", ".ft", "FineTuningEditor", several_layers=True),
    "rome": Kind("ROME", ".rome", "ROMEEditor", needs_statistics=True),
    "t_patcher": Kind("T-Patcher", ".t_patcher", "TPatcherEditor"),
    "lemoe": Kind("LEMoE", ".lemoe", "LEMoEEditor"),
    "grace": Kind("GRACE", ".grace", "GRACEEditor"),
    "alphaedit": Kind("AlphaEdit", ".alphaedit", "AlphaEditEditor", several_layers=True, needs_statistics=True),
    "serac": Kind("SERAC", ".serac", "SERACEditor", trained=True),
    "mend": Kind("MEND", ".mend", "MENDEditor", trained=True, several_layers=True),
    "ibke_paper": Kind(
        "IBKE (paper)",
        "..core.modeling_ibke",
        "IBKEEditor",
        trained=True,
        several_layers=True,
        variant_of="ibke",
        settings={"second_stage_skip": False, "second_stage_mlp": 0, "second_stage_heads": 1},
    ),
    "ibke": Kind("IBKE (ours)", "..core.modeling_ibke", "IBKEEditor", trained=True, several_layers=True),
}


@dataclass(frozen=True)
class Arrangement:
    """How many edits are carried together where a table compares that, beside what each editor does by itself.

    Attributes:
        title: As tables write it.
        editor: Id of the editor that makes the edits, ``"none"`` where the requests stand in front of the prompt.
        routed: Whether a router picks the edits of each prompt.
        solved: Whether the edits are solved together; an editor's own row adds them up, as the paper does.
    """

    title: str
    editor: str
    routed: bool = True
    solved: bool = False


ARRANGEMENTS = {
    "ibke_solved": Arrangement("IBKE solved", "ibke", routed=False, solved=True),
    "mend_solved": Arrangement("MEND solved", "mend", routed=False, solved=True),
    "ibke_routed": Arrangement("IBKE routed", "ibke"),
    "mend_routed": Arrangement("MEND routed", "mend"),
    "context": Arrangement("true request in front", "none", routed=False),
    "context_routed": Arrangement("nearest request in front", "none"),
}
COMPARED = (*KINDS, *ARRANGEMENTS)  # ids of the rows of a table
WITH_WEIGHTS = tuple(name for name, kind in KINDS.items() if kind.trained)
WITHOUT_WEIGHTS = tuple(name for name, kind in KINDS.items() if kind.module and not kind.trained)
TRAINED = tuple(name for name, kind in KINDS.items() if kind.trained and not kind.variant_of)  # also their model types
ATLAS = "ibke-atlas"  # the embedded model's name
OF_ATLAS = ("ibke", "mend")  # the trained editors that are shipped with it


def kind_of(name: str) -> Kind:
    """Return what an id stands for.

    Raises:
        ValueError: If there is no such id.
    """
    if name not in KINDS:
        raise ValueError(f"there is no editor {name!r}; editors are {', '.join(KINDS)}")
    return KINDS[name]


def set_composition(editor: Any, composition: str) -> None:
    """Have an editor carry its edits together by a ``"sum"`` or a ``"solve"``; one without a choice stays as it is."""
    if hasattr(getattr(editor, "config", None), "composition"):
        editor.config.composition = composition


def editor_of(name: str) -> str:
    """Return the id of the editor that a row of a table is made with: its own, or that of its arrangement.

    Raises:
        ValueError: If there is no such id.
    """
    if name in ARRANGEMENTS:
        return ARRANGEMENTS[name].editor
    if name not in KINDS:
        raise ValueError(f"there is no editor {name!r}; editors are {', '.join(COMPARED)}")
    return name


def editor_class(name: str) -> Any:
    """Return the class of an editor.

    Raises:
        ValueError: If there is no such id, or it is that of the unedited model.
    """
    kind = kind_of(name)
    if not kind.module:
        raise ValueError(f"{name!r} stands for the unedited model, which has no editor")
    return getattr(import_module(kind.module, __package__), kind.class_name)


def config_class(name: str) -> Any:
    """Return the class of an editor's config; errors as :func:`editor_class`."""
    editor = editor_class(name)
    return getattr(editor, "config_class", None) or get_type_hints(editor.__init__)["config"]


def edits_projections(name: str) -> bool:
    """Tell whether an editor edits projections that ``edited_modules`` can name where it is made for a model."""
    return bool(kind_of(name).module) and "edited_modules" in signature(editor_class(name).for_backbone).parameters


def register_trained() -> None:
    """Have `AutoModel` know every editor with weights."""
    for name in TRAINED:
        editor_class(name)


def build_editor(
    name: str, model: Any, layers: Sequence[int] | None = None, *, statistics: Any = None, **settings: Any
) -> Any:
    """Return an editor that fits a model, untrained if it has weights; None for ``"none"``.

    Args:
        name: Its id.
        model: Any decoder of the transformers library.
        layers: Edited layers; by default the editor's own choice.
        statistics: The model's key statistics, which some editors need and the others take no notice of.
        settings: Fields of the editor's config.

    Raises:
        ValueError: If there is no such editor or field, a value is out of range or contradicts a variant, or the
            statistics are missing.
        BackboneError: If the editor does not fit the model.
    """
    kind = kind_of(name)
    if not kind.module:
        return None
    if kind.needs_statistics and statistics is None:
        raise ValueError(
            f"{kind.title} needs statistics of the model's keys over a corpus; pass "
            f"statistics=KeyStatistics.of(model, "
            "tokenizer, texts), on the command line --corpus"
        )
    statistics_argument = {"statistics": statistics} if kind.needs_statistics else {}
    if contrary := [field for field, value in kind.settings.items() if settings.get(field, value) != value]:
        raise ValueError(f"{kind.title} has {contrary[0]} = {kind.settings[contrary[0]]}; leave it out")
    fields = {**kind.settings, **settings}
    try:
        return editor_class(name).for_backbone(model, layers, **statistics_argument, **fields)
    except TypeError as error:
        if "unexpected keyword" not in str(error):  # of a dataclass that lacks the field
            raise
        raise ValueError(
            f"{kind.title}: {error}; the fields are those of its config, see {editor_class(name).__module__}"
        ) from error


# --- which editor a model can have ---------------------------------------------------------------------------------


def require_editor(name: str, model: str | Path | None) -> None:
    """Refuse a trained editor that is named by its kind where none is shipped.

    Args:
        name: Id of a kind; anything else passes.
        model: Folder or id of the model; None for the embedded one.

    Raises:
        ValueError: Says which editors the model can have, and how to train one.
    """
    atlas = model is None or str(model) == ATLAS
    if name not in KINDS or not kind_of(name).trained or (atlas and name in OF_ATLAS):
        return
    shipped = "edits the embedded Atlas model only" if name in OF_ATLAS else "is not shipped with this package"
    if atlas:
        raise ValueError(
            f"--editor {name} {shipped}; train it (`ibke table --editors {name}` does), and give its folder"
        )
    raise ValueError(f"--editor {name} {shipped}; {next_steps(model)} (a folder of that name: ./{name})")


def next_steps(model: Any) -> str:
    """Say what to do for a model that the editor at hand does not fit."""
    plain = ", ".join(name for name in WITHOUT_WEIGHTS if not KINDS[name].needs_statistics)
    measured = " or ".join(name for name in WITHOUT_WEIGHTS if KINDS[name].needs_statistics)
    return (
        f"for {model} give --editor {plain}, or {measured} with a --corpus, or the folder or Hub id of an editor "
        f"trained for it: ibke train --backbone {model} --out DIR"
    )
