"""What the model at hand knows, found by asking it once: what a page may offer, and what it may say of the model.

Nobody is asked to change a fact that the model does not have. Of a list of facts (Atlas's own, for other models
``facts.json``) those that the untouched model answers right can be changed; those that it gets wrong, corrected.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..atlas import load_split
from ..atlas.examples import example_records
from ..core.records import EditRecord, PromptFormat
from ..data.facts import Triple, World
from ..evaluation.comparison import BATCH, PageQuestion, format_of, is_right, read_answers, typed_lines
from ..evaluation.generation import FREE_TOKENS, answer_text, generate_ids
from ..evaluation.wording import contains_answer
from ..io import FileError, read_json_list
from ..loading import short_name
from .forms import Form
from .rephrasings import english_rephrasings, template_of, template_rephrasings

FACTS = Path(__file__).with_name("facts.json")
MISTAKES = {"smollm2": Path(__file__).with_name("smollm2.json")}  # what a named model gets wrong, found by asking it
MOST_EXAMPLES, MOST_MISTAKES = 6, 2
CAPITALS, RELATIONS_OF_EACH_DOMAIN = 5, 2  # what Atlas is asked: some capitals, and a fact of so many relations
NEAR, FAR = 5, 5  # facts of the same wording, and any others, that may stand as neighbours


@dataclass(frozen=True)
class StatedFact:
    """A true fact, and the form that changes it.

    Attributes:
        form: Its questions, and the answer that it is changed to.
        answers: Spellings of the true answer.
    """

    form: Form
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A fact to pick.

    Attributes:
        form: What is filled in.
        says: What the untouched model answers.
        knows: Whether that is right; otherwise the form corrects it.
    """

    form: Form
    says: str
    knows: bool


@dataclass(frozen=True)
class Knowledge:
    """What a model knows.

    Attributes:
        about: What the model is, in a sentence.
        examples: Facts to pick, those that it knows first.
        known: Facts that it was asked and knows, as questions with their answers.
        asked: How many it was asked.
        world: Facts and templates that it was taught, where they are known.
    """

    about: str = ""
    examples: tuple[Example, ...] = ()
    known: tuple[PageQuestion, ...] = ()
    asked: int = 0
    world: World | None = field(default=None, repr=False)

    @property
    def placeholder(self) -> tuple[str, str, str]:
        """A prompt that is no example, its answer and another one of its kind; empty if the model knows too little."""
        shown = {example.form.prompt for example in self.examples}
        for question in self.known:
            other = next(
                (q.answers[0] for q in self.known if _alike(q, question) and q.answers != question.answers), ""
            )
            if question.prompt not in shown and other:
                return question.prompt, question.answers[0], other
        return "", "", ""

    def rephrasings(self, prompt: str) -> tuple[tuple[str, ...], bool]:
        """Return the same question in other words, and whether these are known to mean the same."""
        texts = template_rephrasings(self.world, prompt) if self.world is not None else ()
        return (texts, True) if texts else (english_rephrasings(prompt), False)

    def neighbours(self, prompt: str) -> tuple[PageQuestion, ...]:
        """Return facts near the prompt that it does not change: the same asked of others, then of anything."""
        near: list[PageQuestion] = []
        if self.world is not None and (template := template_of(self.world, prompt)) is not None:
            relation, form, subject = template
            others = [t for t in self.world.by_relation.get(relation.id, ()) if t.subject != subject]
            chosen = random.Random(prompt).sample(others, min(NEAR, len(others)))
            near = [PageQuestion("neighbour", relation.prompt(t.subject, form), (t.object,)) for t in chosen]
        far = [replace(one, role="neighbour") for one in self.known if not _names(one.prompt) & _names(prompt)]
        far = random.Random(prompt).sample(far, min(FAR, len(far)))
        return tuple(dict.fromkeys((*near, *far)))


def atlas_knowledge(model: Any, tokenizer: Any) -> Knowledge:
    """Ask Atlas some of what it was taught."""
    world = load_split().taught
    domains = sorted({relation.domain for relation in world.relations.values()})
    about = (
        f"a language model of {_size(model)} parameters that comes with this package. It was taught "
        f"{len(world.triples):,} facts about {', '.join(domains[:-1])} and {domains[-1]}, and knows nothing else"
    )
    facts = [_of_record(record) for record in example_records()]
    return _ask(model, tokenizer, about, facts, _sampled(world), world)


def general_knowledge(model: Any, tokenizer: Any, file: str | Path = FACTS) -> Knowledge:
    """Ask any model the facts of a list, a JSON array of objects.

    An object has ``prompt``, ``answers`` (spellings of the true one) and ``target`` (the answer to change it to), and
    may have ``rephrasings``, ``consequences`` and ``neighbours``, each a list of questions as
    :func:`~ibke_hf.evaluation.comparison.questions_of` reads them. A list of a model's own mistakes, found by asking
    it, is not asked again: the page is there at once.

    Raises:
        ValueError: If the file holds something else; names the fact.
    """
    facts = read_facts(file)
    about = f"a language model of {_size(model)} parameters"
    if Path(file) not in MISTAKES.values():
        return _ask(model, tokenizer, about, facts, ())
    near = (question for fact in facts for question in fact.form.fact().questions if question.role == "neighbour")
    known = tuple(dict.fromkeys(replace(question, role="question") for question in near))
    about += f". Asked {len(facts)} facts in plain text and in a chat, it got all of these wrong"
    return Knowledge(about, tuple(Example(fact.form, "", False) for fact in facts), known)


def facts_of(model: str) -> Path:
    """Return the list of facts that a named model is asked: its own mistakes where they are known."""
    return MISTAKES.get(short_name(model), FACTS)


def find_mistakes(model: Any, tokenizer: Any, facts: Sequence[StatedFact]) -> list[tuple[StatedFact, dict[str, str]]]:
    """Ask a model facts in plain text and in a chat, freely; return those that it gets wrong in both.

    A fact is asked by its prompt, and in a chat by the first of its rephrasings that is a question. A model without a
    chat template is asked in plain text alone.

    Returns:
        The facts, each with what the model ``says`` in ``plain`` text and in a ``chat``.
    """
    asked = [_ways_to_ask(tokenizer, fact) for fact in facts]
    places = [(i, way) for i, ways in enumerate(asked) for way in ways]
    questions = {n: (asked[i][way], FREE_TOKENS) for n, (i, way) in enumerate(places)}
    formats = {n: PromptFormat(chat=way == "chat") for n, (_, way) in enumerate(places)}
    ids = generate_ids(model, tokenizer, questions, BATCH, lambda one, _: nullcontext(one), formats)
    says: list[dict[str, str]] = [{} for _ in facts]
    for n, (i, way) in enumerate(places):
        says[i][way] = " ".join(answer_text(tokenizer, ids[n]).split())
    wrong = [
        not any(contains_answer(text, fact.answers) for text in said.values())
        for fact, said in zip(facts, says, strict=True)
    ]
    return [(fact, said) for fact, said, is_wrong in zip(facts, says, wrong, strict=True) if is_wrong]


def _ways_to_ask(tokenizer: Any, fact: StatedFact) -> dict[str, str]:
    questions = [q.prompt for q in fact.form.fact().questions if q.role in ("request", "rephrase")]
    chat = next((prompt for prompt in questions if format_of(tokenizer, prompt).chat), None)
    return {"plain": fact.form.prompt, **({} if chat is None else {"chat": chat})}


def questions_around(prompt: str, *, atlas: bool, number: int = 2) -> tuple[str, tuple[str, ...]]:
    """Return a prompt in other words, and its neighbours, likest first, without asking any model.

    Args:
        prompt: What is edited.
        atlas: Whether the model is the embedded one, whose facts and templates are known.
        number: Of neighbours.
    """
    world = load_split().taught if atlas else None
    knowledge = Knowledge(world=world)
    facts = _sampled(world) if world is not None else [fact.form.prompt for fact in read_facts(FACTS)]
    prompts = [fact if isinstance(fact, str) else fact.prompt for fact in facts]
    far = [text for text in prompts if text != prompt and not _names(text) & _names(prompt)]
    words = set(prompt.split())
    far.sort(key=lambda text: -len(words & set(text.split())))
    near = [question.prompt for question in knowledge.neighbours(prompt)]
    return knowledge.rephrasings(prompt)[0][0], tuple(dict.fromkeys((*near, *far)))[:number]


def read_facts(file: str | Path) -> list[StatedFact]:
    """Read a list of facts, see :func:`general_knowledge`."""
    cure = "write an array of objects with prompt, answers and target"
    values = read_json_list(file, cure=cure)
    if not values:
        raise FileError(f"{file}: holds no fact; {cure}")
    return [_stated(value, f"{file}: fact {number}") for number, value in enumerate(values, 1)]


def _stated(value: Any, name: str) -> StatedFact:
    texts, lists = ("prompt", "target"), ("answers", "rephrasings", "consequences", "neighbours")
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) and value[key] for key in texts):
        raise ValueError(f"{name}: needs a prompt and a target, both texts; found {str(value)[:80]}")
    if unknown := sorted(set(value) - {*texts, *lists}):
        raise ValueError(f"{name}: {unknown[0]!r} is no key of a fact; the keys are {', '.join((*texts, *lists))}")
    for key in lists:
        if not isinstance(value.get(key, []), list) or not all(isinstance(one, str) for one in value.get(key, [])):
            raise ValueError(f"{name}: {key} must be a list of texts, found {str(value[key])[:80]}")
    form = Form(value["prompt"], value["target"], *("\n".join(value.get(key, ())) for key in lists[1:]))
    form.fact()
    return StatedFact(form, tuple(value.get("answers", ())))


def _of_record(record: EditRecord) -> StatedFact:
    """A record that changes a fact says the true answer beside it; one that states an unknown fact, in its request."""
    form = Form.of_record(record)
    return StatedFact(form, (str(record.metadata.get("original") or form.target),))


def _sampled(world: World) -> list[PageQuestion]:
    """Draw a few facts of every domain, of subjects that the world says most about; capitals first."""

    def rank(triple: Triple) -> tuple[int, str]:
        return -len(world.by_subject[triple.subject]), triple.subject

    numbers = {"capital": CAPITALS}
    for domain in sorted({relation.domain for relation in world.relations.values()}):
        names = [name for name, one in world.relations.items() if one.domain == domain and one.single_value]
        numbers |= {name: 1 for name in names[:RELATIONS_OF_EACH_DOMAIN] if name not in numbers}
    return [
        PageQuestion("question", world.relations[name].prompt(triple.subject), (triple.object,))
        for name, number in numbers.items()
        for triple in sorted(world.by_relation[name], key=rank)[:number]
    ]


def _ask(
    model: Any,
    tokenizer: Any,
    about: str,
    facts: Sequence[StatedFact],
    sampled: Iterable[PageQuestion],
    world: World | None = None,
) -> Knowledge:
    """Ask all facts in one go."""
    stated = [PageQuestion("question", fact.form.prompt, fact.answers) for fact in facts]
    neighbours = [q for fact in facts for q in fact.form.fact().questions if q.role == "neighbour" and q.answers]
    questions = list(dict.fromkeys((*sampled, *stated, *neighbours)))
    readings = read_answers(model, tokenizer, questions)
    says = {question: reading["answer"] for question, reading in zip(questions, readings, strict=True)}
    right = {
        question
        for question, reading in zip(questions, readings, strict=True)
        if is_right(replace(question, role="question"), "", reading["answer"], chat=bool(reading.get("chat")))
    }
    examples = [
        Example(_without_wrong_neighbours(fact, question in right, right), _short(says[question]), question in right)
        for fact, question in zip(facts, stated, strict=True)
        if question not in right or fact.form.target not in fact.answers  # else there is nothing to change
    ]
    knows = [one for one in examples if one.knows][:MOST_EXAMPLES]
    mistakes = [one for one in examples if not one.knows and one.says][:MOST_MISTAKES]
    asked = [question for question in questions if question.role == "question"]
    known = tuple(question for question in asked if question in right)
    return Knowledge(about, (*knows, *mistakes), known, len(asked), world)


def _without_wrong_neighbours(fact: StatedFact, knows: bool, right: set[PageQuestion]) -> Form:
    """Keep the neighbours that the model knows; what it gets wrong anyway would say little by staying as it was.

    A fact that it gets wrong is to become the true one, and has no consequences of a false one.
    """
    form, whole = fact.form, fact.form.fact()
    questions = whole.questions
    kept = [q for q in questions if q.role != "neighbour" or not q.answers or q in right]
    lines = typed_lines(whole.request, kept)
    if knows or form.target in fact.answers:
        return replace(form, neighbours=lines[2])
    rephrasings = "\n".join(q.prompt for q in questions if q.role == "rephrase")
    return Form(form.prompt, fact.answers[0], rephrasings, "", lines[2])


def _alike(one: PageQuestion, other: PageQuestion) -> bool:
    """Tell whether two prompts begin alike, so that the answer of one could be that of the other."""
    return one.prompt.split()[:3] == other.prompt.split()[:3]


def _names(prompt: str) -> set[str]:
    """The words with a capital letter after the first word, and numbers."""
    return {word for word in re.findall(r"\w+", prompt)[1:] if not word.islower()}


def _short(answer: str) -> str:
    """Cut an answer where its first clause ends."""
    return re.split(r"(?:(?<!\b[A-Z])\.|[,;:!?])(?=\s|$)", answer, maxsplit=1)[0].strip()


def _size(model: Any) -> str:
    millions = model.num_parameters() / 1e6
    return f"{millions / 1e3:,.1f} billion" if millions >= 1e3 else f"{millions:,.1f} million"
