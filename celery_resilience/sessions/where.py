"""Where in the user's own code a connection was taken: `file:line`, cheaply."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

_OURS = str(Path(__file__).parent.parent) + os.sep
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_SITE = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
#: Libraries that take a connection in somebody's name.
_TAKERS = ("sqlalchemy", "django", "asgiref")

#: The file of a session of SQLAlchemy's, which tells of itself where it was begun.
SESSION_FILE = f"{os.sep}sqlalchemy{os.sep}orm{os.sep}session.py"

#: Whether a file's code is a library's, by the file's name.
_known: dict[str, int] = {}

_USERS, _LIBRARY, _TAKER, _SESSION, _END = range(5)


def _kind_of(file: str) -> int:
    if file.startswith(_OURS):
        return _END if file.endswith(f"{os.sep}task.py") else _TAKER
    if file.endswith(SESSION_FILE):
        return _SESSION
    if any(file.startswith(folder) for folder in map(_folder_of, _TAKERS) if folder):
        return _TAKER
    if any(name in file for name in _SITE):
        return _LIBRARY
    if file.startswith((_STDLIB, "<frozen")):
        return _TAKER
    return _USERS


def _folder_of(library: str) -> str:
    """Where an imported library is."""
    file = getattr(sys.modules.get(library), "__file__", None)
    return os.path.dirname(file) + os.sep if file else ""


def taken_at(*, stop_at_session: bool = False) -> str | None:
    """
    The innermost frame of the user's own code, or of a library that is no taker.

    Args:
        stop_at_session: Return None where a session of SQLAlchemy's takes it.
    """
    frame = sys._getframe(2)
    library = ""
    while frame is not None:
        file = frame.f_code.co_filename
        kind = _known.get(file)
        if kind is None:
            kind = _known[file] = _kind_of(file)
        if kind == _USERS:
            return f"{file}:{frame.f_lineno}"
        if kind == _SESSION and stop_at_session:
            return None
        if kind == _END:
            break
        if kind == _LIBRARY and not library:
            library = f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return library
