"""A visitor's edits as a value, and the workbench that makes the next such value: what the page does, without the page.

Each fact is edited into the model that carries the facts before it (sequential mode), so their order matters. Undoing
one of them or moving it edits the facts from scratch in the order that is left: the edit that a visitor carries
depends on the list alone and not on how it came about. No weight is ever touched; a visitor without edits has the
plain model, bit by bit.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core.edits import LowRankEdit
from ..core.layers import input_device
from ..core.records import EditRecord, EditRequest
from ..core.tokens import RequestError, context_length, encode
from .compare import (
    PageQuestion,
    Row,
    compare_answers,
    lines_of,
    questions_of,
    require_askable,
    scale_factors,
    without_answers,
)

MAX_EDITS = 100
ATLAS, ARCHIVE = "ibke-atlas", "ibke-edit"
Report = Callable[[tuple[int, int]], Any]  # told how many of how many edits are made, as `gradio.Progress` is


@dataclass(frozen=True)
class Fact:
    """A request with the questions that judge it."""

    request: EditRequest
    questions: tuple[PageQuestion, ...] = ()


@dataclass(frozen=True)
class Form:
    """A fact and its questions as they are typed: one question a line, see :func:`~ibke_hf.app.compare.questions_of`."""

    prompt: str
    target: str
    rephrasings: str = ""
    consequences: str = ""
    neighbours: str = ""

    @classmethod
    def of_record(cls, record: EditRecord) -> Form:
        """Type in the first request of a record, and its cases."""
        request = record.requests[0]
        return cls(request.prompt, request.target, *lines_of(record))

    def fact(self) -> Fact:
        """Read what was typed.

        Raises:
            RequestError: If a question cannot be read.
        """
        request = EditRequest(self.prompt.strip(), self.target.strip())
        return Fact(request, questions_of(request, self.rephrasings, self.consequences, self.neighbours))

    @property
    def asked(self) -> tuple[str, ...]:
        """The questions without their answers."""
        return tuple(map(without_answers, (self.rephrasings, self.consequences, self.neighbours)))

    def fitted(self, examples: Sequence[Form]) -> Form:
        """Drop what belongs to an example that this fact no longer is: its questions, or their answers if only the target is another."""
        example = next((one for one in examples if one.asked == self.asked), None)
        if example is None or (example.prompt, example.target) == (self.prompt, self.target):
            return self
        if example.prompt != self.prompt:
            return Form(self.prompt, self.target)
        return replace(self, rephrasings=self.asked[0], consequences=self.asked[1])


@dataclass(frozen=True)
class Step:
    """A fact as it was edited in: seconds that the edit took, and the scale factors of its tokens, if the editor has any."""

    fact: Fact
    seconds: float
    factors: dict[str, Any] | None = None


@dataclass(frozen=True)
class Session:
    """What one visitor has done, in order; `edit` does all of it, on the CPU so that any process can take it over.

    Attributes:
        steps: The active edits.
        edit: All of them in one; None without any.
        folder: Where this visitor's downloads lie, empty before the first.
    """

    steps: tuple[Step, ...] = ()
    edit: LowRankEdit | None = None
    folder: str = ""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The facts, in order."""
        return tuple(step.fact for step in self.steps)


class Workbench:
    """A model with its editor, shared by all visitors; it keeps nothing of theirs.

    Args:
        model: The backbone.
        tokenizer: Its tokenizer.
        editor: Any editor whose edits are low-rank.
        fine_tuning: The editor to compare with; None for no comparison.
        name: How the model is called.
    """

    def __init__(self, model: Any, tokenizer: Any, editor: Any, fine_tuning: Any = None, name: str = "") -> None:
        self.model, self.tokenizer, self.editor, self.fine_tuning = model, tokenizer, editor, fine_tuning
        self.name = name or getattr(model.config, "name_or_path", "") or "the model"

    # --- active edits -------------------------------------------------------------------------------------------

    def add(self, session: Session, fact: Fact) -> Session:
        """Edit one more fact.

        Raises:
            RequestError: If the fact or a question is unusable, or there are too many edits; the session is as it was.
            NonFiniteError: If the edits before have broken the model.
        """
        if len(session.steps) >= MAX_EDITS:
            raise RequestError(f"{MAX_EDITS} edits are active, which is as many as this page keeps; undo one first")
        self.check(fact)
        step, edit = self._edit(fact, session.edit)
        return replace(session, steps=(*session.steps, step), edit=edit)

    def remove(self, session: Session, index: int, report: Report | None = None) -> Session:
        """Undo one edit, whichever it is.

        Raises:
            RequestError: If there is no such edit.
            NonFiniteError: If the edits that are left break the model; the session is as it was.
        """
        self._require(session, index)
        return self._again(session, session.facts[:index] + session.facts[index + 1 :], report)

    def move(self, session: Session, index: int, by: int, report: Report | None = None) -> Session:
        """Edit one fact earlier (`by` < 0) or later than now, as far as that goes.

        Raises:
            RequestError: If there is no such edit.
            NonFiniteError: If the edits break the model in the new order; the session is as it was.
        """
        self._require(session, index)
        facts = list(session.facts)
        facts.insert(min(max(index + by, 0), len(facts) - 1), facts.pop(index))
        return session if tuple(facts) == session.facts else self._again(session, facts, report)

    def clear(self, session: Session) -> Session:
        """Undo all edits."""
        return replace(session, steps=(), edit=None)

    def _again(self, session: Session, facts: Sequence[Fact], report: Report | None) -> Session:
        """Edit facts from scratch."""
        steps: list[Step] = []
        edit: LowRankEdit | None = None
        for fact in facts:
            if report is not None:
                report((len(steps), len(facts)))
            step, edit = self._edit(fact, edit)
            steps.append(step)
        return replace(session, steps=tuple(steps), edit=edit)

    def _edit(self, fact: Fact, previous: LowRankEdit | None) -> tuple[Step, LowRankEdit]:
        started = time.perf_counter()
        edit = self.editor.edit(self.model, self.tokenizer, [fact.request], mode="sequential", previous=previous).to(
            "cpu"
        )
        seconds = time.perf_counter() - started
        requests = (*(() if previous is None else previous.info.requests), fact.request)
        edit = replace(edit, info=replace(edit.info, requests=requests))
        return Step(
            fact, seconds, scale_factors(self.editor, self.model, self.tokenizer, fact.request, previous)
        ), edit

    def check(self, fact: Fact) -> None:
        """Refuse a fact that cannot be edited or asked about, before anything is done.

        Raises:
            RequestError: Says which text is at fault.
        """
        require_askable(self.model, self.tokenizer, fact.questions)
        request = fact.request
        encode(self.tokenizer, request.prompt, request.target, name="the fact", max_length=context_length(self.model))

    def _require(self, session: Session, index: int) -> None:
        if not 0 <= index < len(session.steps):
            raise RequestError(f"there is no edit {index + 1}; {len(session.steps)} are active")

    # --- what the model answers ---------------------------------------------------------------------------------

    def look(self, session: Session, index: int) -> list[Row]:
        """Ask the questions of one active fact, of the untouched model and of the one that carries all of the visitor's edits."""
        self._require(session, index)
        return self._compare(session.facts[index].questions, session.edit)

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
        """Edit one fact alone into the untouched model, by the editor and by fine-tuning, and ask its questions of both.

        Returns:
            By name of the editor: ``rows`` (see :func:`~ibke_hf.app.compare.compare_answers`), ``seconds``, ``nbytes``
            of the edit.

        Raises:
            RequestError: If there is no fine-tuning editor, or the fact is unusable.
        """
        if self.fine_tuning is None:
            raise RequestError("no fine-tuning editor was given to compare with")
        self.check(fact)
        columns: dict[str, dict[str, Any]] = {}
        editors = {"IBKE": self.editor, "fine-tuning": self.fine_tuning}
        for name, editor in editors.items():
            if report is not None:
                report((len(columns), len(editors)))
            started = time.perf_counter()
            edit = editor.edit(self.model, self.tokenizer, [fact.request])
            seconds = time.perf_counter() - started
            columns[name] = {"rows": self._compare(fact.questions, edit), "seconds": seconds, "nbytes": edit.nbytes}
        return columns

    def _compare(self, questions: Sequence[PageQuestion], edit: Any) -> list[Row]:
        here = None if edit is None else edit.to(input_device(self.model))
        return compare_answers(self.model, self.tokenizer, questions, here)

    # --- files --------------------------------------------------------------------------------------------------

    def save(self, session: Session) -> tuple[Session, Path]:
        """Write all active edits as one LoRA adapter, zipped, to the visitor's own folder; the file before it is replaced.

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


def forget(session: Session) -> None:
    """Remove the files of a visitor who has left."""
    if session.folder:
        shutil.rmtree(session.folder, ignore_errors=True)


def load_workbench(editor: str | None = None, backbone: str | None = None) -> Workbench:
    """Load a model and its editor to the accelerator, if there is one: by default Atlas's, without a download.

    Args:
        editor: Folder or Hub id of a trained editor.
        backbone: Folder or Hub id of its model; by default the one that the editor was trained for.

    Raises:
        ValueError: If a backbone is given without an editor for it, what was loaded is no editor, or the two do not
            fit.
        OSError: If one cannot be loaded.
    """
    from ..atlas import load_backbone, load_editor, load_rival

    if editor is None:
        if backbone is not None:
            raise ValueError(f"a backbone ({backbone}) needs an editor that was trained for it; give both")
        model, tokenizer = load_backbone()
        return _placed(model, tokenizer, load_editor("ibke"), load_rival("ft", model), "Atlas")
    made = _load_editor(editor)
    name = backbone or made.config.base_model_name_or_path
    if name == ATLAS:
        model, tokenizer = load_backbone()
        return _placed(model, tokenizer, made, load_rival("ft", model), "Atlas")
    if not name:
        raise ValueError(f"{editor}: does not say which backbone it was trained for; give the backbone too")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..editors.ft import FineTuningEditor

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval(),
        AutoTokenizer.from_pretrained(name),
    )
    made.modules_of(model)
    tuned = FineTuningEditor.for_backbone(model, made.config.edited_layers, made.config.edited_modules)
    return _placed(model, tokenizer, made, tuned, name.rstrip("/").rpartition("/")[2])


def _load_editor(name: str) -> Any:
    from transformers import AutoModel

    from ..core.modeling_ibke import GradientEditor
    from ..editors.catalogue import register_trained

    register_trained()
    editor = AutoModel.from_pretrained(name, dtype="float32").eval()
    if not isinstance(editor, GradientEditor):
        what = "whose edits are no LoRA" if hasattr(editor, "edit") else "not an editor"
        raise ValueError(
            f"{name}: holds a {type(editor).__name__}, {what}; the page takes IBKE and MEND, which `ibke train` makes"
        )
    return editor


def _placed(model: Any, tokenizer: Any, editor: Any, fine_tuning: Any, name: str) -> Workbench:
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        model, editor = model.to(device), editor.to(device)
    return Workbench(model, tokenizer, editor, fine_tuning, name)
