"""A call with a misspelt word is refused as a misspelt option is, with what is accepted."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from celery_resilience.errors import ConfigurationError

Taken = ParamSpec("Taken")
Result = TypeVar("Result")


def known_words(
    title: str | None = None,
) -> Callable[[Callable[Taken, Result]], Callable[Taken, Result]]:
    """
    Let a function refuse words that it does not take with a ConfigurationError.

    Its signature is what it was, for readers and type checkers.

    Args:
        title: What the message calls it. None: the type of its first argument.
    """

    def refusing(function: Callable[Taken, Result]) -> Callable[Taken, Result]:
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        others = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        taken = {*known, *others}

        @wraps(function)
        def refuses(*args: Taken.args, **words: Taken.kwargs) -> Result:
            wrong = [word for word in words if word not in taken]
            if wrong:
                called = title or type(args[0]).__name__
                raise ConfigurationError(
                    "; ".join(_sentence(called, word, known) for word in wrong)
                )
            return function(*args, **words)

        return refuses

    return refusing


def _sentence(called: str, word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    meant = f", did you mean {near[0]}?" if near else ""
    accepted = f"it takes {', '.join(known)}" if known else "it takes none"
    return f"{called}(): unknown option {word}{meant} ({accepted})"
