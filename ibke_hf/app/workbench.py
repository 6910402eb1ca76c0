"""The workbench: what a visitor does makes the next value of what the visitor carries. The page without the page."""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..analysis.scale_factors import scale_factors
from ..core.composition import RIDGE
from ..core.layers import input_device
from ..core.records import EditRequest
from ..core.tokens import RequestError, context_length, encode
from ..evaluation.comparison import (
    PageQuestion,
    Row,
    compare_answers,
    format_of,
    is_right,
    read_answers,
    require_askable,
)
from ..lifelong.routed import RoutedEditor
from .forms import Fact
from .knowledge import Knowledge, atlas_knowledge, facts_of, general_knowledge
from .session import Session, Step

MAX_EDITS = 100
AUTOMATIC = 3  # questions of a kind that are asked of a fact for which nobody typed any
ARCHIVE = "ibke-edit"
FINE_TUNING = "ft"
CARDS = {"smollm2": "smollm2-135m-instruct"}  # folders of published editors, by the name of their model
Report = Callable[[tuple[int, int]], Any]  # told how many of how many edits are made, as `gradio.Progress` is


class Workbench:
    """A model with its editor, shared by all visitors; it keeps nothing of theirs.

    Args:
        model: The backbone.
        tokenizer: Its tokenizer.
        editor: Any editor whose edits can be summed, as low-rank ones and those of fine-tuning can.
        fine_tuning: The editor to compare with; None for no comparison.
        name: How the model is called.
        knowledge: What it knows.
        note: What is to be said of the editor, in a line.
        router: Finds the edits of a prompt, so that a visitor's list is a library; None: all act on every prompt.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        editor: Any,
        fine_tuning: Any = None,
        name: str = "",
        knowledge: Knowledge | None = None,
        note: str = "",
        router: Any = None,
    ) -> None:
        config = getattr(editor, "config", None)
        composition = getattr(config, "composition", None)
        self.ridge: float | None = None if composition == "sum" else getattr(config, "ridge", RIDGE)
        # an edit is made for the company of those to come
        self.company: dict[str, Any] = (
            {} if composition in (None, "sum") or router is not None else {"composition": "solve"}
        )
        self.maker = editor if router is None else RoutedEditor(editor, router)
        self.model, self.tokenizer, self.editor, self.fine_tuning = model, tokenizer, editor, fine_tuning
        self.knowledge, self.note = knowledge or Knowledge(), note
        self.name = name or getattr(model.config, "name_or_path", "") or "the model"

    @property
    def saves_lora(self) -> bool:
        """Whether edits are saved as LoRA adapters; those of fine-tuning are dense."""
        from ..editors.ft import FineTuningEditor

        return not isinstance(self.editor, FineTuningEditor)

    # --- active edits -------------------------------------------------------------------------------------------

    def add(self, session: Session, fact: Fact, *, instead: bool = False) -> Session:
        """Edit one more fact; an active edit of the same prompt makes way for it.

        Args:
            session: The visitor's.
            fact: Without rephrasings or neighbours it gets some that the model understands, see :meth:`completed`.
            instead: All active edits make way for it.

        Raises:
            RequestError: If the fact or a question is unusable, or there are too many edits; the session is as it was.
            NonFiniteError: If the edit is not finite.
        """
        kept = [] if instead else [step for step in session.steps if step.fact.request.prompt != fact.request.prompt]
        if len(kept) >= MAX_EDITS:
            raise RequestError(f"{MAX_EDITS} edits are active, which is as many as this page keeps; undo one first")
        self.check(fact)
        request = self.as_put(fact.request)
        started = time.perf_counter()
        edit = self.maker.edit(self.model, self.tokenizer, [request], **self.company).to("cpu")
        seconds = time.perf_counter() - started
        factors = scale_factors(self.editor, self.model, self.tokenizer, request)
        return session.carrying((*kept, Step(self.completed(fact), edit, seconds, factors)), self.ridge)

    def as_put(self, request: EditRequest) -> EditRequest:
        """Return a request as it is put to the model: a question in a chat, where the model knows chats."""
        return replace(request, format=format_of(self.tokenizer, request.prompt))

    def restore(self, session: Session, facts: Sequence[Fact]) -> Session:
        """Edit facts in again, those that a visitor had before."""
        for fact in facts[:MAX_EDITS]:
            session = self.add(session, fact)
        return session

    def remove(self, session: Session, index: int) -> Session:
        """Undo one edit, whichever it is.

        Raises:
            RequestError: If there is no such edit.
        """
        self._require(session, index)
        return session.carrying((step for i, step in enumerate(session.steps) if i != index), self.ridge)

    def clear(self, session: Session) -> Session:
        """Undo all edits."""
        return session.carrying(())

    def completed(self, fact: Fact) -> Fact:
        """Add the same question in other words, and neighbours, to a fact for which nobody typed any.

        Guessed rephrasings are asked only if the untouched model answers them as it answers the fact's prompt, and
        neighbours only if it knows them: anything else would judge the question and not the edit.
        """
        roles = {question.role for question in fact.questions}
        prompt, target = fact.request.prompt, fact.request.target
        texts, certain = self.knowledge.rephrasings(prompt) if "rephrase" not in roles else ((), False)
        candidates = [PageQuestion("rephrase", text, (target,), automatic=True) for text in texts]
        if "neighbour" not in roles:
            candidates += [replace(one, automatic=True) for one in self.knowledge.neighbours(prompt)]
        candidates = [one for one in candidates if self._is_askable(one)]
        if not candidates or not fact.questions:
            return fact
        first, *readings = read_answers(self.model, self.tokenizer, [fact.questions[0], *candidates])
        chosen: dict[str, list[PageQuestion]] = {"rephrase": [], "neighbour": []}
        for question, reading in zip(candidates, readings, strict=True):
            same = certain or reading["answer"] == first["answer"]
            usable = (
                same
                if question.role == "rephrase"
                else is_right(replace(question, role="question"), "", reading["answer"], chat=_in_chat(reading))
            )
            if usable and len(chosen[question.role]) < AUTOMATIC:
                chosen[question.role].append(question)
        return replace(fact, questions=(*fact.questions, *chosen["rephrase"], *chosen["neighbour"]))

    def _is_askable(self, question: PageQuestion) -> bool:
        try:
            require_askable(self.model, self.tokenizer, [question])
        except RequestError:
            return False
        return True

    def check(self, fact: Fact) -> None:
        """Refuse a fact that cannot be edited or asked about, before anything is done.

        Raises:
            RequestError: Says which text is at fault.
        """
        require_askable(self.model, self.tokenizer, fact.questions)
        request, limit = self.as_put(fact.request), context_length(self.model)
        form = request.format
        encode(self.tokenizer, request.prompt, request.target, name="the fact", max_length=limit, prompt_format=form)

    def _require(self, session: Session, index: int) -> None:
        if not 0 <= index < len(session.steps):
            raise RequestError(f"there is no edit {index + 1}; {len(session.steps)} are active")

    def of_rank(self, session: Session, rank: int) -> Session:
        """Cut all edits to a rank, those to come too; 0 makes them whole again.

        Raises:
            RequestError: If there is no such rank, or edits cannot be cut.
        """
        if rank < 0:
            raise RequestError(f"a rank is 0, for whole edits, or more; found {rank}")
        if rank and not self.saves_lora:
            raise RequestError("the edits of fine-tuning have no low rank to cut; give an editor such as IBKE")
        return replace(session, rank=rank).carrying(session.steps, self.ridge)

    # --- what the model answers ---------------------------------------------------------------------------------

    def look(self, session: Session, index: int) -> list[Row]:
        """Ask the questions of one active fact, of the untouched model and of the one that carries all edits."""
        self._require(session, index)
        return self._compare(session.facts[index].questions, session.edit)

    def holding(self, session: Session) -> list[bool]:
        """Tell of each active fact whether the model that carries all of them answers it as it was edited to."""
        if len(session.steps) == 0:
            return []
        questions = [PageQuestion("request", f.request.prompt, (f.request.target,)) for f in session.facts]
        readings = read_answers(self.model, self.tokenizer, questions, self._here(session.edit))
        return [
            bool(is_right(question, "", reading["answer"], chat=_in_chat(reading)))
            for question, reading in zip(questions, readings, strict=True)
        ]

    def ask(self, session: Session, prompt: str) -> list[Row]:
        """Ask anything, of the untouched model and of the one that carries all of the visitor's edits.

        Raises:
            RequestError: If the prompt is empty or too long.
        """
        if not prompt.strip():
            raise RequestError("the question is empty; give it at least one word")
        questions = [PageQuestion("question", prompt.strip())]
        require_askable(self.model, self.tokenizer, questions)
        return self._compare(questions, session.edit)

    def side_by_side(self, fact: Fact, report: Report | None = None) -> dict[str, dict[str, Any]]:
        """Edit one fact alone into the untouched model, by the editor and by fine-tuning, and ask both its questions.

        Returns:
            By name of the editor: ``rows`` (see :func:`~ibke_hf.evaluation.comparison.compare_answers`), ``seconds``,
            ``nbytes`` of the edit.

        Raises:
            RequestError: If there is no fine-tuning editor, or the fact is unusable.
        """
        if self.fine_tuning is None:
            raise RequestError("no fine-tuning editor was given to compare with")
        self.check(fact)
        fact = self.completed(fact)
        columns: dict[str, dict[str, Any]] = {}
        editors = {"IBKE": self.editor, "fine-tuning": self.fine_tuning}
        for name, editor in editors.items():
            if report is not None:
                report((len(columns), len(editors)))
            started = time.perf_counter()
            edit = editor.edit(self.model, self.tokenizer, [self.as_put(fact.request)])
            seconds = time.perf_counter() - started
            columns[name] = {"rows": self._compare(fact.questions, edit), "seconds": seconds, "nbytes": edit.nbytes}
        return columns

    def _compare(self, questions: Sequence[PageQuestion], edit: Any) -> list[Row]:
        return compare_answers(self.model, self.tokenizer, questions, self._here(edit))

    def _here(self, edit: Any) -> Any:
        """Return an edit on the model's device."""
        return None if edit is None else edit.to(input_device(self.model))

    # --- files --------------------------------------------------------------------------------------------------

    def save(self, session: Session) -> tuple[Session, Path]:
        """Write all active edits as one, zipped, to the visitor's own folder, over the file before it.

        Low-rank edits are saved as a LoRA adapter.

        Raises:
            RequestError: If there are none.
        """
        if session.edit is None:
            raise RequestError("there is no active edit to save; edit a fact first")
        folder = Path(session.folder or tempfile.mkdtemp(prefix="ibke-session-"))
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            session.edit.save_pretrained(Path(scratch) / ARCHIVE)
            with zipfile.ZipFile(Path(scratch) / "whole.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted((Path(scratch) / ARCHIVE).iterdir()):
                    archive.write(file, f"{ARCHIVE}/{file.name}")
            saved = (Path(scratch) / "whole.zip").replace(folder / f"{ARCHIVE}.zip")
        return replace(session, folder=str(folder)), saved


def _in_chat(reading: Mapping[str, Any]) -> bool:
    return bool(reading.get("chat"))


def load_workbench(editor: str | None = None, backbone: str | None = None) -> Workbench:
    """Load a model and its editor to the accelerator, if there is one: by default Atlas's, without a download.

    The model is asked what it knows before it goes to the accelerator, which may be lent for single calls only.

    Args:
        editor: Folder or Hub id of a trained editor, or ``ft``, which needs no training. By default the one that
            was trained for the backbone, if it is at hand (:func:`trained_editor`), else ``ft``.
        backbone: Folder, Hub id, GGUF file or name of its model; by default the one that the editor was trained for.

    Raises:
        ValueError: If what was loaded is no editor for a page, or the two do not fit.
        OSError: If one cannot be loaded.
    """
    from ..editors.catalogue import ATLAS, WITHOUT_WEIGHTS
    from ..lifelong.router import Router
    from ..loading import backbone_name, hub_id, load_editor, load_model, placed, router_beside

    note = ""
    if editor is None and backbone not in (None, ATLAS):
        editor = trained_editor(str(backbone)) or FINE_TUNING
        note = (
            f"No editor trained for {backbone} is at hand, so fine-tuning (ft) edits it; name one with --editor."
            if editor == FINE_TUNING
            else f"Edited by the editor in {editor}."
        )
    if editor in WITHOUT_WEIGHTS and editor != FINE_TUNING:
        raise ValueError(f"{editor}: its edits cannot be summed on a page; give {FINE_TUNING} or a trained editor")
    chosen = None if editor == FINE_TUNING else load_editor(editor or "ibke")
    _require_summable(editor or "ibke", chosen)
    name = backbone or (ATLAS if chosen is None else backbone_name(chosen))
    if not name:
        raise ValueError(f"{editor}: does not say which backbone it was trained for; give the backbone too")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model, tokenizer = load_model(name, device=device)
    chosen = load_editor(FINE_TUNING, backbone=model) if chosen is None else placed(chosen, model)
    if name == ATLAS:
        knowledge, tuned = atlas_knowledge(model, tokenizer), load_editor(FINE_TUNING, backbone=model)
    else:
        knowledge, tuned = general_knowledge(model, tokenizer, facts_of(name)), _fine_tuning(model, chosen)
    rival = None if editor == FINE_TUNING else tuned
    called = "Atlas" if name == ATLAS else hub_id(name).rstrip("/").rpartition("/")[2]
    beside = router_beside(editor, atlas=name == ATLAS) if editor != FINE_TUNING else None
    router = None if beside is None else Router.from_pretrained(beside).eval()
    return Workbench(model, tokenizer, chosen, rival, called, knowledge, note, router)


def trained_editor(backbone: str) -> str | None:
    """Return the folder of the editor that was trained for a named model, if it lies here or beside this package."""
    from ..loading import short_name

    name = CARDS.get(short_name(backbone))
    if name is None:
        return None
    places = (Path("model_cards") / name, Path(__file__).parents[2] / "model_cards" / name)
    return next((str(place) for place in places if any(place.glob("*.safetensors"))), None)


def _fine_tuning(model: Any, editor: Any) -> Any:
    """Return a fine-tuning editor of the layers that another editor edits."""
    from ..editors.ft import FineTuningEditor

    config = getattr(editor, "config", None)
    layers, modules = getattr(config, "edited_layers", None), getattr(config, "edited_modules", None)
    return FineTuningEditor.for_backbone(model, layers, modules)


def _require_summable(name: str, editor: Any) -> None:
    from ..core.modeling_ibke import GradientEditor

    if editor is not None and not isinstance(editor, GradientEditor):
        raise ValueError(
            f"{name}: holds a {type(editor).__name__}, whose edits are no LoRA; the page takes IBKE and MEND, which "
            f"`ibke train` makes, and {FINE_TUNING}"
        )
