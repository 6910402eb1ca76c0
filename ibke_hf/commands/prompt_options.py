"""The options that say how prompts are put to a model: through its chat template, and with which leading space."""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args

from ..core.records import LeadingSpace


def prompt_options(command: Any) -> None:
    """Add the options that :func:`prompt_changes` reads to a command or a group of its options."""
    command.add_argument("--chat", action="store_true", help="ask through the tokenizer's chat template")
    command.add_argument(
        "--chat-options",
        type=_chat_options,
        metavar="JSON",
        help="what the template is given, such as '{\"enable_thinking\": false}' or enable_thinking=false",
    )
    command.add_argument(
        "--leading-space",
        choices=get_args(LeadingSpace),
        help="before a target: auto leaves it out where the script or an opening quote does (default of one fact); "
        "protocol sets it always (default of records)",
    )


def prompt_changes(options: argparse.Namespace, tokenizer: Any = None) -> dict[str, Any]:
    """Return the fields of :class:`~ibke_hf.core.records.PromptFormat` that the options set.

    Args:
        options: The parsed options.
        tokenizer: Checked for a chat template, if it is to be used.

    Raises:
        ValueError: If options of a chat template are given without ``--chat``, or the tokenizer has no template.
    """
    if options.chat_options and not options.chat:
        raise ValueError("--chat-options: only a chat template takes them; give --chat as well")
    if options.chat and tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat: the tokenizer has no chat template; leave the chat option off for this model")
    fields = {"chat": options.chat, "chat_options": options.chat_options, "leading_space": options.leading_space}
    return {name: value for name, value in fields.items() if value}


def free_option(command: Any) -> None:
    """Add the option of commands that score answers, which :func:`is_free` reads."""
    command.add_argument(
        "--free",
        action="store_true",
        help="also let the model answer by itself, without the target's length, and look for the target in that; "
        "--chat does so in the chat",
    )


def is_free(options: argparse.Namespace) -> bool:
    """Tell whether the model also answers freely: asked for, or in a chat unless nothing is to be generated.

    Raises:
        ValueError: If it is asked for, and so is that nothing be generated.
    """
    silent = getattr(options, "no_generate", False)
    if options.free and silent:
        raise ValueError("--free: nothing is generated with --no-generate; leave one of them out")
    return bool(options.free or (options.chat and not silent))


def _chat_options(text: str) -> dict[str, Any]:
    """Read a JSON object, or ``name=value`` pairs between commas, whose values are JSON or else plain text."""
    try:
        if text.lstrip().startswith("{"):
            return dict(json.loads(text))
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(name.strip() and sign for name, sign, _ in pairs):
            raise ValueError
        return {name.strip(): _value(value.strip()) for name, _, value in pairs}
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"a JSON object or name=value is expected, such as enable_thinking=false, found {text[:80]!r}"
        ) from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
