"""The page of the editor's Space, also `ibke app`: edit a fact, see before and after, keep or undo the edits.

A visitor's edits are a :class:`~ibke_hf.app.workbench.Session` in ``gr.State``; the model is shared and never changed.
Every handler attaches the edits and asks the model within one call, so that no other visitor's call can see them. The
visitor's browser keeps the list of facts, which are edited in again when the page is reloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib import import_module
from typing import Any

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the page needs the extra "demo": pip install "ibke-hf[demo]"') from error

from transformers.utils import logging

from ..evaluation.comparison import Row
from .drawings import answer_card, editors_figure
from .forms import Fact, Form
from .knowledge import Example
from .look import (
    BY_ITSELF,
    EACH,
    NO_EDITS,
    SCROLL,
    STYLE,
    TITLE,
    WAITING,
    choices,
    details,
    heading,
    launch_options,
    summary,
    warning,
)
from .session import Session, forget
from .workbench import MAX_EDITS, Workbench, load_workbench

__all__ = ["STYLE", "WAITING", "Page", "accelerated", "build_app", "launch", "launch_options"]

logger = logging.get_logger(__name__)
RANKS = [("whole", 0), ("4", 4), ("2", 2), ("1", 1)]  # that edits can be cut to
AT_ONCE = 4  # handlers that may run the model at the same time
HOUR = 3600
MODEL_CALLS = ("add", "restore", "look", "holding", "ask", "side_by_side")  # of a workbench: what runs the model
STORED = "ibke-edits"  # name in the browser's storage; it is no secret what a visitor's own browser keeps
USER_ERRORS = (
    ValueError,
    ArithmeticError,
    OSError,
)  # what a visitor can mend; of others the page says no more than Error
Shown = dict[Any, Any]


def build_app(bench: Workbench, examples: Sequence[Example] = ()) -> gr.Blocks:
    """Build the page.

    Args:
        bench: The model and its editor.
        examples: Facts to pick; the first one is filled in.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(HOUR, 4 * HOUR)) as blocks:
        Page(bench, examples).wire(blocks)
    blocks.queue(max_size=256)
    return blocks


def launch(editor: str | None = None, backbone: str | None = None, **options: Any) -> Any:
    """Load a model with its editor and serve the page.

    Args:
        editor: Folder or Hub id of an editor, or ``ft``; by default what the environment variable IBKE_EDITOR says,
            else the one that belongs to the backbone, see :func:`~ibke_hf.app.workbench.load_workbench`.
        backbone: Folder or Hub id of its model; by default IBKE_BACKBONE, else the one that the editor was trained
            for.
        options: Of ``gradio.Blocks.launch``.
    """
    on_accelerator = accelerated()  # before anything is loaded: it has to see that
    bench = load_workbench(
        editor or os.environ.get("IBKE_EDITOR") or None, backbone or os.environ.get("IBKE_BACKBONE") or None
    )
    if bench.note:
        logger.warning(bench.note)
    for name in MODEL_CALLS:
        setattr(bench, name, on_accelerator(getattr(bench, name)))
    return build_app(bench, bench.knowledge.examples).launch(**{**launch_options(), **options})


def accelerated() -> Callable[[Any], Any]:
    """Return ZeroGPU's decorator, which lends an accelerator for a call; elsewhere one without effect."""
    try:
        module = import_module("spaces")
    except ImportError:
        return _unchanged
    return getattr(module, "GPU", _unchanged)  # a mere folder of that name has none


def _unchanged(function: Any) -> Any:
    return function


@contextmanager
def told() -> Iterator[None]:
    """Show what a visitor can mend as a message in the page, without a traceback."""
    try:
        yield
    except USER_ERRORS as error:
        raise gr.Error(escape(str(error), quote=False), duration=20, print_exception=False) from error


def _settling(event: Any, handler: Any, inputs: list[Any], outputs: list[Any], **options: Any) -> None:
    """Call a handler once an event has ended, well or badly: after a failure, Gradio 6 leaves `then` out."""
    for ended in (event.then, event.failure):
        ended(handler, inputs, outputs, queue=False, **options)


class Page:
    """The components of the page, and what happens when they are used."""

    def __init__(self, bench: Workbench, examples: Sequence[Example]) -> None:
        self.bench, self.examples = bench, tuple(example.form for example in examples)
        self.session = gr.State(Session(), time_to_live=4 * HOUR, delete_callback=forget)
        self.browser = gr.BrowserState(None, storage_key=STORED, secret=STORED)
        gr.HTML(heading(bench.name, bench.model.num_parameters(), bench.knowledge))
        with gr.Row(elem_classes="ibke-page"):  # a phone shows these from top to bottom, see app.css for more room
            with gr.Column(elem_classes="ibke-inputs", min_width=0):
                self._inputs(examples)
            with gr.Column(elem_classes="ibke-outcome", min_width=0):
                self.verdict = gr.HTML(WAITING, label="verdict", elem_id="verdict")
            with gr.Column(elem_classes="ibke-sides", min_width=0):
                self._side()
            with gr.Column(elem_classes="ibke-answers", min_width=0):
                self._results()

    # --- components ---------------------------------------------------------------------------------------------

    def _inputs(self, examples: Sequence[Example]) -> None:
        first = self.examples[0] if self.examples else Form("", "")
        known, _, other = self.bench.knowledge.placeholder
        field: dict[str, Any] = {"max_lines": 4}
        with gr.Row(elem_classes="ibke-fact"):
            self.prompt = gr.Textbox(
                first.prompt, label="The model is asked", placeholder=known, scale=5, min_width=200, **field
            )
            self.target = gr.Textbox(
                first.target, label="and shall answer", placeholder=other, scale=3, min_width=140, **field
            )
            button: dict[str, Any] = {"size": "lg", "scale": 1, "min_width": 110, "interactive": False}
            self.edit_button = gr.Button("Edit", variant="primary", elem_id="edit", **button)
            self.replace_button = gr.Button("Replace", variant="primary", elem_id="replace", visible=False, **button)
            self.add_button = gr.Button("Add", elem_id="add", visible=False, **button)
        self.warning = gr.HTML("", label="warning", elem_id="warning", visible=False)
        with gr.Accordion("What to ask before and after", open=False):
            gr.Markdown(f"{EACH}. {BY_ITSELF}", elem_classes="ibke-faint")
            fields = {
                "rephrasings": "In other words (should follow)",
                "consequences": "Consequences (should follow)",
                "neighbours": "Other facts (should stay)",
            }
            boxes = [
                gr.Textbox(getattr(first, name), label=label, lines=2, max_lines=8) for name, label in fields.items()
            ]
        self.form = [self.prompt, self.target, *boxes]
        for label, knows in (("or pick a fact that it knows", True), ("or correct a mistake that it makes", False)):
            if forms := [example.form for example in examples if example.knows == knows]:
                names = [f"{form.prompt} → {form.target}" for form in forms]
                samples = [list(vars(form).values()) for form in forms]
                gr.Examples(samples, self.form, example_labels=names, label=label, examples_per_page=12)

    def _results(self) -> None:
        self.results = gr.HTML("", label="results", elem_id="results")
        self.rows = gr.JSON(visible=False, label="rows")
        with gr.Column(visible=False) as self.more:
            self.compare_button = gr.Button("Compare with fine-tuning", size="sm", elem_id="compare")
            self.comparison = gr.HTML(label="comparison", elem_id="comparison", min_height=60)

    def _side(self) -> None:
        small: dict[str, Any] = {"size": "sm", "min_width": 60}
        bare: dict[str, Any] = {"show_label": False, "container": False}
        with gr.Column(elem_classes="ibke-side"):
            gr.HTML('<h2 class="ibke-title">Your active edits</h2>')
            self.none_yet = gr.HTML(NO_EDITS, label="none yet")
            with gr.Column(visible=False) as self.tools:
                self.active = gr.Radio([], label="active edits", elem_id="active", elem_classes="ibke-list", **bare)
                with gr.Row(elem_classes="ibke-buttons"):
                    self.undo_button = gr.Button("Undo", elem_id="undo", **small)
                    self.clear_button = gr.Button("Undo all", elem_id="clear", **small)
                self.rank = gr.Radio(
                    RANKS, value=0, label="rank of an edit", elem_id="rank", visible=self.bench.saves_lora
                )
                saved = "LoRA adapter" if self.bench.saves_lora else "dense edit"
                self.save_button = gr.Button(f"Save as {saved}", size="sm", elem_id="save")
                self.file = gr.File(visible=False, label=saved, interactive=False, height=80)
        with gr.Column(elem_classes="ibke-side"):
            gr.HTML('<h2 class="ibke-title">Ask it anything else</h2>')
            known = self.bench.knowledge.placeholder[0]
            self.question = gr.Textbox(label="question", placeholder=known, elem_id="question", **bare)
            self.ask_button = gr.Button("Ask before and after", size="sm", elem_id="ask")
            self.asked = gr.HTML(label="asked", elem_id="asked")

    # --- wires --------------------------------------------------------------------------------------------------

    def wire(self, blocks: gr.Blocks) -> None:
        """Connect the components with the handlers."""
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": AT_ONCE}
        chosen = [self.active, self.session]
        private: dict[str, Any] = {"api_visibility": "private"}
        fields = [*self.form, self.session]
        self._changing([self.edit_button.click, self.add_button.click], self.edit, fields, model)
        entered = [self.replace_button.click, self.prompt.submit, self.target.submit]
        self._changing(entered, self.replace, fields, model)
        self._changing([self.undo_button.click], self.undo, chosen, model)
        self._changing([self.clear_button.click], self.undo_all, [self.session], model)
        self._changing([self.rank.input], self.cut, [self.rank, *chosen], model)
        self._changing([self.save_button.click], self.save, [self.session], model, [self.session, self.file])
        restored = [self.browser, self.session]
        quiet: dict[str, Any] = {"show_progress": "hidden", **private}
        loaded = blocks.load(self.restore, restored, [*self._shown_in, self.session], **quiet, **model)
        _settling(loaded, self.settle, [self.session], [self.browser, *self._locked], **quiet)
        self.active.input(self.show, chosen, self._shown_in, api_name="show", **model)
        self.compare_button.click(self.compare, chosen, [self.comparison], api_name="compare", **model)
        asking = [self.ask_button.click, self.question.submit]
        answered = [self.asked, self.rows]
        gr.on(
            asking,
            self.ask,
            [self.question, self.session],
            answered,
            api_name="ask",
            show_progress_on=[self.asked],
            **model,
        )
        typed = [self.prompt.input, self.target.input]
        gr.on(typed, self.fit, self.form, self.form[2:], queue=False, trigger_mode="always_last", **quiet)

    @property
    def _shown_in(self) -> list[Any]:
        """The components that :meth:`_shown` fills."""
        buttons = [self.edit_button, self.replace_button, self.add_button, self.warning]
        side = [self.active, self.none_yet, self.tools, self.file, self.asked]
        return [*buttons, *side, self.verdict, self.results, self.rows, self.more, self.comparison]

    @property
    def _locked(self) -> list[Any]:
        """The components that wait while a visitor's edits change; what they did then would be lost, or done twice."""
        edits = [self.edit_button, self.replace_button, self.add_button, self.prompt, self.target]
        return [*edits, self.undo_button, self.clear_button, self.rank, self.save_button, self.active]

    def _changing(
        self, triggers: Sequence[Any], handler: Any, inputs: list[Any], model: dict[str, Any], outputs: Any = None
    ) -> None:
        """Call a handler that changes a visitor's edits: lock the page, call it, unlock, let the browser keep them."""
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        lock = f"() => Array({len(self._locked)}).fill({{__type__: 'update', interactive: false}})"
        started = gr.on(list(triggers), None, None, self._locked, js=lock, **private)
        changes = outputs or [*self._shown_in, self.session]
        name, bar = handler.__name__, {"show_progress_on": [self.verdict if outputs is None else self.file]}
        done = started.then(handler, inputs, changes, api_name=name, **bar, **model)
        _settling(done, self.settle, [self.session], [self.browser, *self._locked], **private)
        if name in ("edit", "replace"):
            done.success(None, js=SCROLL, **private)

    # --- handlers -----------------------------------------------------------------------------------------------

    def fit(self, *form: str) -> tuple[str, ...]:
        """Drop the questions of an example once its fact is changed by hand."""
        fitted = Form(*form).fitted(self.examples)
        return fitted.rephrasings, fitted.consequences, fitted.neighbours

    def edit(
        self,
        prompt: str,
        target: str,
        rephrasings: str,
        consequences: str,
        neighbours: str,
        session: Session,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  where gradio looks for it
    ) -> Shown:
        """Edit a fact beside this visitor's edits so far, and ask its questions before and after."""
        form = Form(prompt, target, rephrasings, consequences, neighbours)
        return self._edited(form, session, progress, instead=False)

    def replace(
        self,
        prompt: str,
        target: str,
        rephrasings: str,
        consequences: str,
        neighbours: str,
        session: Session,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Shown:
        """Undo this visitor's edits, edit a fact, and ask its questions before and after."""
        form = Form(prompt, target, rephrasings, consequences, neighbours)
        return self._edited(form, session, progress, instead=True)

    def _edited(self, form: Form, session: Session, progress: Any, *, instead: bool) -> Shown:
        with told():
            fact = form.fitted(self.examples).fact()
            progress(0.1, desc="editing")
            session = self.bench.add(session, fact, instead=instead)
            progress(0.5, desc="asking before and after")
            return {**self._shown(session, len(session.steps) - 1), self.session: session}

    def undo(self, index: int | None, session: Session) -> Shown:
        """Undo the chosen edit."""
        with told():
            chosen = _chosen(index, session)
            session = self.bench.remove(session, chosen)
            return {**self._shown(session, min(chosen, len(session.steps) - 1)), self.session: session}

    def undo_all(self, session: Session) -> Shown:
        """Undo every edit of this visitor."""
        session = self.bench.clear(session)
        return {**self._shown(session, -1), self.session: session}

    def cut(self, rank: int, index: int | None, session: Session) -> Shown:
        """Cut all edits of this visitor to a rank, or make them whole again."""
        with told():
            chosen = _chosen(index, session)
            session = self.bench.of_rank(session, rank)
            return {**self._shown(session, chosen), self.session: session}

    def settle(self, session: Session) -> Shown:
        """Let the browser keep the facts that are edited now, and the visitor go on."""
        facts = [list(vars(Form.of_fact(fact)).values()) for fact in session.facts]
        stored = {"model": self.bench.name, "facts": facts}  # also of no facts: None would leave what is kept there
        return {self.browser: stored} | {one: gr.update(interactive=True) for one in self._locked}

    def restore(self, stored: Any, session: Session) -> Shown:
        """Edit in again what this visitor's browser has kept, after a reload; what it cannot have kept is left out."""
        facts = stored.get("facts") if isinstance(stored, dict) and stored.get("model") == self.bench.name else None
        if session.steps or not isinstance(facts, list) or not facts:
            return {self.session: session}
        with told():
            forms = [Form(*map(str, one)) for one in facts[:MAX_EDITS] if isinstance(one, list) and len(one) == 5]
            session = self.bench.restore(session, [form.fact() for form in forms])
            return {**self._shown(session, len(session.steps) - 1), self.session: session}

    def show(self, index: int | None, session: Session) -> Shown:
        """Show the chosen edit."""
        with told():
            return self._shown(session, _chosen(index, session))

    def compare(self, index: int | None, session: Session, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        """Edit the chosen fact alone, by this editor and by fine-tuning, and show the answers side by side."""
        with told():
            fact: Fact = session.facts[_chosen(index, session)]
            figure = editors_figure(self.bench.side_by_side(fact, progress))
            return f"<h3>This fact alone, in the untouched model</h3>{figure}"

    def save(self, session: Session) -> tuple[Session, Any]:
        """Write the active edits as one LoRA adapter, zipped."""
        with told():
            session, file = self.bench.save(session)
            return session, gr.File(str(file), visible=True)

    def ask(self, prompt: str, session: Session) -> tuple[str, list[Row]]:
        """Ask anything, of the untouched model and of the one with this visitor's edits."""
        with told():
            rows = self.bench.ask(session, prompt)
            return "".join(map(answer_card, rows)), rows

    def _shown(self, session: Session, index: int) -> Shown:
        """Return what the page shows of a visitor's edits, one of them in full."""
        number, some = len(session.steps), bool(session.steps)
        rows = self.bench.look(session, index) if some else []
        holding = self.bench.holding(session) if number > 1 else [True] * number
        text = warning(number) if some else ""
        return {
            self.edit_button: gr.Button(visible=not some),
            self.replace_button: gr.Button(visible=some),
            self.add_button: gr.Button(visible=some),
            self.warning: gr.HTML(text, visible=bool(text)),
            self.active: gr.Radio(choices(session, holding, session.conflicts()), value=index if some else None),
            self.none_yet: gr.HTML(visible=not some),
            self.tools: gr.Column(visible=some),
            self.file: gr.File(None, visible=False),
            self.asked: "",
            self.verdict: summary(session, index, rows, holding) if some else WAITING,
            self.results: details(session, index, rows) if some else "",
            self.rows: rows,
            self.more: gr.Column(visible=some and self.bench.fine_tuning is not None),
            self.comparison: "",
        }


def _chosen(index: int | None, session: Session) -> int:
    if index is None or not 0 <= index < len(session.steps):
        raise ValueError("no active edit is chosen; choose one in the list")
    return index
