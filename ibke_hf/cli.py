"""The `ibke` command: parse, call, print. Errors go to stderr with exit code 2 and no traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import (
    app,
    atlas,
    bench,
    card,
    check,
    data,
    demo,
    drift,
    edit,
    evaluate,
    export,
    families,
    figures,
    library,
    plan,
    push,
    spaces,
    sweep,
    table,
    train,
    tune,
)

USER_ERRORS = (ValueError, OSError, ImportError, ArithmeticError)
# of libraries that are not loaded yet, or that derive from no class of the above
LIBRARY_ERRORS = {"YAMLError", "SafetensorError", "StrictDataclassError", "HTTPError", "OutOfMemoryError"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: the command's own, 2 for errors that the user can mend, 130."""
    parser = build_parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if empty := next((word for word in words if word.startswith("--") and word.endswith("=--")), None):
        parser.error(
            f"argument {empty[:-3]}: a value is wanted, found '--'"
        )  # argparse would make an empty list of it
    options = parser.parse_args(words)
    try:
        code = options.run(options)
    except KeyboardInterrupt:
        print("ibke: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        print(f"ibke {options.title}: {_message(error)}", file=sys.stderr)
        return 2
    return code or 0


def _is_for_the_user(error: Exception) -> bool:
    return isinstance(error, USER_ERRORS) or any(kind.__name__ in LIBRARY_ERRORS for kind in type(error).__mro__)


def _message(error: Exception) -> str:
    """Return one line, but for facts: one for each bad row."""
    from .data.facts import FactsError

    return str(error) if isinstance(error, FactsError) else " ".join(str(error).split())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; tests parse every command of the documentation with it."""
    parser = argparse.ArgumentParser(prog="ibke", description="Correct facts inside language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for group in (
        demo,
        edit,
        export,
        check,
        drift,
        library,
        train,
        evaluate,
        table,
        sweep,
        tune,
        figures,
        data,
        push,
        card,
        app,
        spaces,
        families,
        bench,
        plan,
        atlas,
    ):
        group.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
