"""What went wrong, as plain data: type, message, cause chain, fingerprint.

Described in the process that still has the real traceback, which is the child
for an exception and the main process for a death.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from celery_resilience.redaction import safe_text, storable

MAX_MESSAGE_CHARS = 8_192
MAX_TRACEBACK_CHARS = 65_536
MAX_CAUSES = 8

#: Innermost functions of the app's own code that make a fingerprint.
FINGERPRINT_FRAMES = 5

_LIBRARY_DIRS = tuple(
    sorted(
        {
            *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")),
            *(sysconfig.get_path(name) for name in ("purelib", "platlib")),
        }
    )
)

_OUR_DIR = str(Path(__file__).parent)


@dataclass(frozen=True, slots=True)
class Failure:
    """
    Why a delivery failed.

    Attributes:
        exception: Qualified name of the exception's true type.
        message: Its text, at most `MAX_MESSAGE_CHARS`, never raising.
        fingerprint: The same for failures with the same cause: type and cause
            chain with the innermost five in-app functions; no line number, no
            message, no host.
        traceback: At most `MAX_TRACEBACK_CHARS`, cut in the middle.
    """

    exception: str
    message: str
    fingerprint: str
    traceback: str = ""


def type_name(kind: type[BaseException]) -> str:
    """`module.Class`, without the module for built-in exceptions."""
    if kind.__module__ in ("builtins", "__main__", None):
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def describe(exc: BaseException, package: str = "") -> dict[str, str]:
    """
    The facts of *exc* that are lost on its way to the main process.

    Celery hands over a pickleable parent class or a wrapper in place of an
    exception that cannot be pickled, and no cause chain (``app/trace.py:227``).
    """
    return {
        "exception": type_name(type(exc)),
        "message": safe_text(exc, MAX_MESSAGE_CHARS),
        "fingerprint": fingerprint(exc, package),
    }


def fingerprint(exc: BaseException, package: str = "") -> str:
    """
    16 hex digits that are the same for the same cause.

    Args:
        exc: The exception with its traceback.
        package: Top-level package of the task, which is in-app even where it
            is installed beside the libraries.
    """
    digest = hashlib.blake2b(digest_size=8)
    for cause in _chain(exc):
        digest.update(f"|{type_name(type(cause))}".encode())
        for function in _in_app_functions(cause.__traceback__, package):
            digest.update(f">{function}".encode())
    return digest.hexdigest()


def fingerprint_of(*parts: str) -> str:
    """A fingerprint for a failure without a traceback, from what it has."""
    digest = hashlib.blake2b("|".join(parts).encode(errors="replace"), digest_size=8)
    return digest.hexdigest()


def cut_traceback(text: str) -> str:
    """A traceback that keeps its first and last parts, and says what is cut."""
    text = storable(text)
    if len(text) <= MAX_TRACEBACK_CHARS:
        return text
    half = MAX_TRACEBACK_CHARS // 2
    return (
        f"{text[:half]}\n... [{len(text) - 2 * half} characters cut] ...\n"
        f"{text[-half:]}"
    )


def _chain(exc: BaseException, seen: set[int] | None = None) -> Iterator[BaseException]:
    """The exception, the members of a group, and their causes; each once."""
    seen = set() if seen is None else seen
    current: BaseException | None = exc
    while current is not None and id(current) not in seen and len(seen) < MAX_CAUSES:
        seen.add(id(current))
        yield current
        if isinstance(current, BaseExceptionGroup):
            for member in current.exceptions:
                yield from _chain(member, seen)
        if current.__cause__ is not None:
            current = current.__cause__
        else:
            current = None if current.__suppress_context__ else current.__context__


def _in_app_functions(traceback: TracebackType | None, package: str) -> list[str]:
    """The innermost in-app functions, outermost first, recursion counted once."""
    functions: list[str] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        module = str(traceback.tb_frame.f_globals.get("__name__", ""))
        if _is_in_app(code.co_filename) or (
            package and module.partition(".")[0] == package
        ):
            functions.append(f"{module}:{code.co_qualname}")
        traceback = traceback.tb_next
    innermost = list(dict.fromkeys(reversed(functions)))[:FINGERPRINT_FRAMES]
    return innermost[::-1]


@lru_cache(maxsize=2048)
def _is_in_app(filename: str) -> bool:
    return not (
        filename.startswith(("<", _OUR_DIR, *_LIBRARY_DIRS))
        or "site-packages" in filename
        or "dist-packages" in filename
    )


def failure_of(facts: dict[str, Any], traceback: str) -> Failure:
    """A failure from the facts that the child sent and its cut traceback."""
    return Failure(
        exception=facts["exception"],
        message=facts["message"],
        fingerprint=facts["fingerprint"],
        traceback=traceback,
    )
