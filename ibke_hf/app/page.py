"""The page of the editor's Space, also `ibke app`: edit a fact, see before and after, keep or undo the edits.

A visitor's edits are a :class:`~ibke_hf.app.workbench.Session` in ``gr.State``; the model is shared and never changed.
Every handler attaches the edits and asks the model within one call, so that no other visitor's call can see them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the page needs the extra "demo": pip install "ibke-hf[demo]"') from error

from ..atlas.examples import example_records
from .compare import Row
from .drawings import answer_card, comparison_figure, duration, editors_figure, scale_factor_figure
from .workbench import Fact, Form, Session, Workbench, forget, load_workbench

STYLE = Path(__file__).with_name("app.css")
AT_ONCE = 4  # handlers that may run the model at the same time
HOUR = 3600
USER_ERRORS = (
    ValueError,
    ArithmeticError,
    OSError,
)  # what a visitor can mend; others are ours, and the page says no more than Error
Shown = dict[Any, Any]

HEADING = """<header class="ibke-head"><h1>Change one fact inside a language model</h1>
<p>Type a fact and press <b>Edit</b>: the model gives the new answer, however you ask, and what follows from it changes too.
Everything else should stay as it was.</p>
<p class="ibke-faint">Model: {name}. No weight is touched: every edit is undone exactly, and nobody else sees yours.</p></header>"""
WAITING = """<div class="ibke-waiting"><p>Press <b>Edit</b>: the model is asked before and after, and you see</p><ul>
<li><b>The fact</b> itself: does it answer what you said?</li>
<li><b>Should follow</b>: the same in other words, and what the fact implies.</li>
<li><b>Should stay</b>: neighbouring facts that must not change.</li></ul></div>"""
NO_EDITS = '<p class="ibke-faint ibke-none">None yet: the model is untouched.</p>'
SCROLL = """() => {
  const results = document.getElementById("results");
  if (results.getBoundingClientRect().top > 0.7 * window.innerHeight) results.scrollIntoView({behavior: "smooth"});
}"""
EACH = "one question a line; the right answer after an arrow: question -> answer | other spelling"


def build_app(bench: Workbench, examples: Sequence[Form] = ()) -> gr.Blocks:
    """Build the page.

    Args:
        bench: The model and its editor.
        examples: Facts to pick; the first one is filled in.
    """
    with gr.Blocks(
        title="Change one fact inside a language model", analytics_enabled=False, delete_cache=(HOUR, 4 * HOUR)
    ) as blocks:
        Page(bench, examples).wire()
    blocks.queue(max_size=256)
    return blocks


def launch(editor: str | None = None, backbone: str | None = None, **options: Any) -> Any:
    """Load a model with its editor and serve the page.

    Args:
        editor: Folder or Hub id of an editor; by default what the environment variable IBKE_EDITOR says, else Atlas's.
        backbone: Folder or Hub id of its model; by default IBKE_BACKBONE, else the one that the editor was trained
            for.
        options: Of ``gradio.Blocks.launch``.
    """
    on_accelerator = accelerated()  # before anything is loaded: it has to see that
    bench = load_workbench(
        editor or os.environ.get("IBKE_EDITOR") or None, backbone or os.environ.get("IBKE_BACKBONE") or None
    )
    for name in ("add", "remove", "move", "look", "ask", "side_by_side"):
        setattr(bench, name, on_accelerator(getattr(bench, name)))
    return build_app(bench, [Form.of_record(record) for record in example_records()]).launch(
        **{**launch_options(), **options}
    )


def launch_options() -> dict[str, Any]:
    """Return the look of the page, which gradio takes when it is launched: fonts of the system, nothing from elsewhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    ).set(
        block_title_background_fill="none",
        block_title_text_color="*body_text_color",
        block_title_padding="0",
        block_title_text_weight="600",
        block_label_background_fill="none",
        button_secondary_border_color="*border_color_primary",
        button_border_width="1px",
        input_border_width="1px",
        checkbox_border_color="*neutral_400",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        checkbox_label_background_fill_selected="*primary_100",
        checkbox_label_text_color_selected="*body_text_color",
        checkbox_label_background_fill_selected_dark="*primary_900",
    )
    return {"theme": theme, "css_paths": STYLE, "ssr_mode": False, "footer_links": ["api"]}


def accelerated() -> Callable[[Any], Any]:
    """Return ZeroGPU's decorator, which lends an accelerator for the length of a call; elsewhere one that does nothing."""
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


class Page:
    """The components of the page, and what happens when they are used."""

    def __init__(self, bench: Workbench, examples: Sequence[Form]) -> None:
        self.bench, self.examples = bench, tuple(examples)
        self.session = gr.State(Session(), time_to_live=4 * HOUR, delete_callback=forget)
        gr.HTML(
            HEADING.format(name=escape(f"{bench.name}, {bench.model.num_parameters() / 1e6:,.1f} million parameters"))
        )
        with gr.Row(elem_classes="ibke-columns"):
            with gr.Column(scale=7, min_width=340):
                self._inputs()
                self._results()
            with gr.Column(scale=3, min_width=300):
                self._side()

    # --- components ---------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        first = self.examples[0] if self.examples else Form("", "")
        with gr.Row(elem_classes="ibke-fact"):
            self.prompt = gr.Textbox(
                first.prompt,
                label="The model is asked",
                placeholder="The capital of France is",
                max_lines=4,
                scale=5,
                min_width=200,
            )
            self.target = gr.Textbox(
                first.target, label="and shall answer", placeholder="Rome", max_lines=4, scale=3, min_width=140
            )
            self.edit_button = gr.Button("Edit", variant="primary", size="lg", scale=1, min_width=110, elem_id="edit")
        with gr.Accordion("What to ask before and after", open=False):
            gr.Markdown(EACH, elem_classes="ibke-faint")
            fields = {
                "rephrasings": "Rephrasings (should follow)",
                "consequences": "Consequences (should follow)",
                "neighbours": "Neighbours (should stay)",
            }
            boxes = [
                gr.Textbox(getattr(first, name), label=label, lines=2, max_lines=8) for name, label in fields.items()
            ]
        self.form = [self.prompt, self.target, *boxes]
        if self.examples:
            samples = [
                [one.prompt, one.target, one.rephrasings, one.consequences, one.neighbours] for one in self.examples
            ]
            labels = [f"{one.prompt} → {one.target}" for one in self.examples]
            gr.Examples(samples, self.form, example_labels=labels, label="or pick a fact", examples_per_page=12)

    def _results(self) -> None:
        self.results = gr.HTML(WAITING, label="results", elem_id="results")
        self.rows = gr.JSON(visible=False, label="rows")
        with gr.Column(visible=False) as self.more:
            self.compare_button = gr.Button("Compare with fine-tuning", size="sm", elem_id="compare")
            self.comparison = gr.HTML(label="comparison", elem_id="comparison", min_height=60)

    def _side(self) -> None:
        with gr.Column(elem_classes="ibke-side"):
            gr.HTML('<h2 class="ibke-title">Your active edits</h2>')
            self.none_yet = gr.HTML(NO_EDITS, label="none yet")
            with gr.Column(visible=False) as self.tools:
                self.active = gr.Radio(
                    [],
                    label="active edits",
                    show_label=False,
                    container=False,
                    elem_id="active",
                    elem_classes="ibke-list",
                )
                with gr.Row(elem_classes="ibke-buttons"):
                    self.earlier_button = gr.Button("↑ Earlier", size="sm", min_width=60)
                    self.later_button = gr.Button("↓ Later", size="sm", min_width=60)
                with gr.Row(elem_classes="ibke-buttons"):
                    self.undo_button = gr.Button("Undo", size="sm", min_width=60, elem_id="undo")
                    self.clear_button = gr.Button("Undo all", size="sm", min_width=60, elem_id="clear")
                self.save_button = gr.Button("Save as LoRA adapter", size="sm", elem_id="save")
                self.file = gr.File(visible=False, label="LoRA adapter", interactive=False, height=80)
        with gr.Column(elem_classes="ibke-side"):
            gr.HTML('<h2 class="ibke-title">Ask it anything else</h2>')
            self.question = gr.Textbox(
                label="question",
                placeholder="The capital of Italy is",
                show_label=False,
                container=False,
                elem_id="question",
            )
            self.ask_button = gr.Button("Ask before and after", size="sm", elem_id="ask")
            self.asked = gr.HTML(label="asked", elem_id="asked")

    def wire(self) -> None:
        """Connect the components with the handlers."""
        changed = [
            self.session,
            self.active,
            self.none_yet,
            self.tools,
            self.results,
            self.rows,
            self.more,
            self.comparison,
            self.file,
            self.asked,
        ]
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": AT_ONCE}
        edits: dict[str, Any] = {"outputs": changed, "show_progress_on": [self.results], **model}
        edited = gr.on(
            [self.edit_button.click, self.prompt.submit, self.target.submit],
            self.edit,
            [*self.form, self.session],
            api_name="edit",
            **edits,
        )
        edited.success(None, js=SCROLL, api_visibility="private")
        for button, handler in (
            (self.undo_button, self.undo),
            (self.earlier_button, self.earlier),
            (self.later_button, self.later),
        ):
            button.click(handler, [self.active, self.session], api_name=handler.__name__, **edits)
        self.clear_button.click(self.undo_all, [self.session], api_name="undo_all", **edits)
        self.active.input(self.show, [self.active, self.session], api_name="show", **edits)
        self.compare_button.click(
            self.compare, [self.active, self.session], [self.comparison], api_name="compare", **model
        )
        self.save_button.click(self.save, [self.session], [self.session, self.file], api_name="save", **model)
        gr.on(
            [self.ask_button.click, self.question.submit],
            self.ask,
            [self.question, self.session],
            [self.asked, self.rows],
            api_name="ask",
            show_progress_on=[self.asked],
            **model,
        )
        gr.on(
            [self.prompt.input, self.target.input],
            self.fit,
            self.form,
            self.form[2:],
            show_progress="hidden",
            queue=False,
            trigger_mode="always_last",
            api_visibility="private",
        )

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
        """Edit a fact into the model that carries this visitor's edits so far, and ask its questions before and after."""
        with told():
            fact = Form(prompt, target, rephrasings, consequences, neighbours).fitted(self.examples).fact()
            progress(0.1, desc="editing")
            session = self.bench.add(session, fact)
            progress(0.5, desc="asking before and after")
            return self._shown(session, len(session.steps) - 1)

    def undo(self, index: int | None, session: Session, progress: gr.Progress = gr.Progress()) -> Shown:  # noqa: B008
        """Undo the chosen edit; those that came after it are edited in again without it."""
        with told():
            chosen = _chosen(index, session)
            session = self.bench.remove(session, chosen, progress)
            return self._shown(session, min(chosen, len(session.steps) - 1))

    def earlier(self, index: int | None, session: Session, progress: gr.Progress = gr.Progress()) -> Shown:  # noqa: B008
        """Edit the chosen fact in before the one that comes before it now."""
        return self._move(index, -1, session, progress)

    def later(self, index: int | None, session: Session, progress: gr.Progress = gr.Progress()) -> Shown:  # noqa: B008
        """Edit the chosen fact in after the one that comes after it now."""
        return self._move(index, 1, session, progress)

    def _move(self, index: int | None, by: int, session: Session, progress: Any) -> Shown:
        with told():
            chosen = _chosen(index, session)
            session = self.bench.move(session, chosen, by, progress)
            return self._shown(session, min(max(chosen + by, 0), len(session.steps) - 1))

    def undo_all(self, session: Session) -> Shown:
        """Undo every edit of this visitor."""
        return self._shown(self.bench.clear(session), -1)

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
        rows = self.bench.look(session, index) if session.steps else []
        choices = [
            (f"{i}. {fact.request.prompt} → {fact.request.target}", i - 1) for i, fact in enumerate(session.facts, 1)
        ]
        some = bool(session.steps)
        return {
            self.session: session,
            self.active: gr.Radio(choices, value=index if some else None),
            self.none_yet: gr.HTML(visible=not some),
            self.tools: gr.Column(visible=some),
            self.results: _figure(session, index, rows) if some else WAITING,
            self.rows: rows,
            self.more: gr.Column(visible=some and self.bench.fine_tuning is not None),
            self.comparison: "",
            self.file: gr.File(None, visible=False),
            self.asked: "",
        }


def _chosen(index: int | None, session: Session) -> int:
    if index is None or not 0 <= index < len(session.steps):
        raise ValueError("no active edit is chosen; choose one in the list")
    return index


def _figure(session: Session, index: int, rows: Sequence[Row]) -> str:
    step, number = session.steps[index], len(session.steps)
    carried = "this edit" if number == 1 else f"your {number} edits, shown for number {index + 1}"
    return (
        f'<p class="ibke-summary">Before: the untouched model. After: with {carried}. Bars: the most probable next tokens. '
        f'<span class="ibke-tally ibke-open">edited in {duration(step.seconds)}</span></p>{comparison_figure(rows)}'
        f'<section class="ibke-group ibke-inside"><h3>How strongly each token is edited</h3>'
        f'<p class="ibke-faint">the scale factor, by edited layer</p>{scale_factor_figure(step.factors)}</section>'
    )
