"""How a task's call gets its key. No Celery, no I/O.

A key is made once, where the task is sent, and travels with the message.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from celery_resilience.errors import ConfigurationError, NoKey
from celery_resilience.idempotency.canonical import NoCanonicalForm, canonical, write
from celery_resilience.redaction import storable

#: Characters of a key's name: what a store keeps, and what most providers take.
MAX_NAME = 255

#: Of a longer name, or one that not every broker takes, so many are kept, and the rest
#: is a digest of it all.
_KEPT = 200

#: Texts that are shown as they are; anything else is quoted.
_PLAIN = re.compile(r"[A-Za-z0-9_.@+-]*[A-Za-z_@][A-Za-z0-9_.@+-]*")

#: Between two values that are shown as they are, one of these must stand.
_SEPARATOR = re.compile(r"[^A-Za-z0-9_.@+\"\\-]")

#: Values that may hold what is hidden, and are long: a name has a digest of them.
_MANY = (Mapping, list, tuple, set, frozenset, bytes, bytearray)

#: Words that stand for values of other types.
_WORDS = frozenset({"null", "true", "false"})

#: Types whose values are shown without more ado.
_SIMPLE = frozenset({str, int, bool, type(None)})

#: Changed when names or digests of the same call would change.
_VERSION = 1


class MadeKey(NamedTuple):
    """
    The key of one call.

    Attributes:
        name: As people read it; the same effect, the same name.
        fingerprint: Of all arguments, 32 hexadecimal digits; "" where they have no
            canonical form, and are not compared.
    """

    name: str
    fingerprint: str


Spec = str | bool | Callable[..., Any]


class KeyMaker:
    """
    Makes the keys of one task.

    Args:
        spec: A template over the arguments, such as "charge:{order_id}"; a callable
            that is called as the body is, and returns a text, or None for no key; or
            True: all arguments.
        parameters: Of the task's body, without a bound `self`.
        task: The task's name.
        is_hidden: Whether an argument is never shown: a key has a digest of it.

    Raises:
        ConfigurationError: The template names no argument, or does more than that.
    """

    def __init__(
        self,
        spec: Spec,
        parameters: inspect.Signature,
        task: str,
        is_hidden: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._is_hidden = is_hidden
        self._task = task
        self._signature = parameters
        self._binds_simply = _binds_simply(parameters)
        self._simple = [
            (name, parameter.default)
            for name, parameter in parameters.parameters.items()
        ]
        self._names = tuple(parameters.parameters)
        #: Of each argument, in the order of the canonical text of a mapping: what is
        #: before it there, its default, and that one's text.
        self._before = sorted(
            (
                (canonical(name), name, default, _text_of(default))
                for name, default in map(_default_of, parameters.parameters.values())
            ),
            key=lambda argument: argument[0],
        )
        self._parts: list[tuple[str, str | None]] = []
        self._is_plain = False
        if isinstance(spec, str):
            self._parts = _parse(spec, parameters)
            between = [text for text, name in self._parts if name is not None][1:]
            self._is_plain = all(map(_SEPARATOR.search, between))
            self._name_of: Callable[..., str | None] = self._from_template
        elif callable(spec):
            self._spec = spec
            self._name_of = self._from_callable
        elif spec is True:
            self._name_of = self._from_arguments
        else:
            raise ConfigurationError(
                "idempotency_key must be a template such as 'charge:{order_id}', a "
                f"callable or True, got {spec!r}"
            )

    def make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> MadeKey | None:
        """
        The key of a call with these arguments, as the worker sees them.

        Returns:
            None where a callable says that this call has no key.

        Raises:
            TypeError: The body would not take these arguments.
            NoKey: No key can be made of them.
        """
        bound = self._bind(args, kwargs)
        try:
            fingerprint = _digest(self._text(bound))
        except NoCanonicalForm:
            fingerprint = ""
        name = self._name_of(bound, fingerprint, args, kwargs)
        if name is None:
            return None
        if len(name) > MAX_NAME or storable(name) != name:
            name = f"{storable(name)[:_KEPT]}…{_digest(name)}"
        return MadeKey(name, fingerprint)

    def _text(self, bound: dict[str, Any]) -> str:
        """
        The canonical text of the arguments that are not their parameter's default.

        A parameter that is added with one, while messages wait, changes no call.
        """
        parts: list[str] = []
        count = 0
        for before, name, default, default_text in self._before:
            value = bound[name]
            if value is default:
                continue
            start = len(parts)
            parts.append(before)
            write(value, parts)
            if default_text is not None and default_text == "".join(parts[start + 1 :]):
                del parts[start:]
            else:
                count += 1
        return f"m{count}:{''.join(parts)}"

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if not self._binds_simply or len(args) > len(self._simple):
            found = self._signature.bind(*args, **kwargs)
            found.apply_defaults()
            return dict(found.arguments)
        if not kwargs and len(args) == len(self._simple):
            return dict(zip(self._names, args, strict=True))
        bound: dict[str, Any] = {}
        used = 0
        for position, (name, default) in enumerate(self._simple):
            if position < len(args):
                bound[name] = args[position]
            elif name in kwargs:
                bound[name] = kwargs[name]
                used += 1
            elif default is not inspect.Parameter.empty:
                bound[name] = default
            else:
                raise TypeError(f"missing a required argument: {name!r}")
        if used != len(kwargs):
            raise TypeError("arguments that the task does not take, or takes once")
        return bound

    def _from_arguments(
        self, bound: dict[str, Any], fingerprint: str, *_: Any
    ) -> str | None:
        if not fingerprint:
            for _before, name, default, _text in self._before:
                if (value := bound[name]) is not default:
                    self._canonical(name, value)
        return f"{self._task}:{fingerprint}"

    def _from_template(self, bound: dict[str, Any], *_: Any) -> str | None:
        said: list[str] = []
        for text, name in self._parts:
            said.append(text)
            if name is not None:
                value = bound[name] if name in bound else self._extra(bound, name)
                said.append(self._shown(name, value))
        return "".join(said)

    def _from_callable(
        self,
        bound: dict[str, Any],
        fingerprint: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> str | None:
        try:
            name = self._spec(*args, **kwargs)
        except TypeError as exc:
            # The body may take these arguments; without a key it would run unguarded.
            raise NoKey(f"idempotency_key of {self._task} raised {exc!r}") from exc
        if name is None or (isinstance(name, str) and name):
            return name
        raise NoKey(
            f"idempotency_key of {self._task} returned a {type(name).__qualname__}, and "
            "must return a text that is not empty, or None for no key"
        )

    def _extra(self, bound: dict[str, Any], name: str) -> Any:
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                rest = bound.get(parameter.name, {})
                if name in rest:
                    return rest[name]
        raise NoKey(f"idempotency_key of {self._task}: there is no argument {name!r}")

    def _shown(self, name: str, value: Any) -> str:
        """One value in a name: no other value of any type is shown alike."""
        kind = type(value)
        is_simple = kind in _SIMPLE
        if self._is_hidden(name) or (not is_simple and isinstance(value, _MANY)):
            return f"<#{_digest(self._canonical(name, value))}>"
        if kind is str:
            if self._is_plain and _PLAIN.fullmatch(value) and value not in _WORDS:
                return str(value)
            return json.dumps(value, ensure_ascii=False)
        if self._is_plain and is_simple:
            return str(value) if kind is int else json.dumps(value)
        return f"<{self._canonical(name, value)}>"

    def _canonical(self, name: str, value: Any) -> str:
        try:
            return canonical(value)
        except NoCanonicalForm as exc:
            raise NoKey(
                f"idempotency_key of {self._task}: the argument {name!r} holds {exc}, "
                "which has no one form to make a key of: give the task a key of other "
                "arguments, or a callable"
            ) from exc


def store_key(namespace: str, task: str, name: str) -> str:
    """What a store knows a key by: two tasks never share one."""
    text = f"{_prefix(namespace, task)}{len(name)}:{name}"
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


@cache
def _prefix(namespace: str, task: str) -> str:
    parts = (str(_VERSION), namespace, task)
    return "".join(f"{len(part)}:{part}" for part in parts)


def _digest(text: str) -> str:
    data = text.encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _default_of(parameter: inspect.Parameter) -> tuple[str, Any]:
    """The value of a parameter that nobody gives; its mark for none, if it has none."""
    if parameter.kind is parameter.VAR_POSITIONAL:
        return parameter.name, ()
    if parameter.kind is parameter.VAR_KEYWORD:
        return parameter.name, {}
    return parameter.name, parameter.default


def _text_of(default: Any) -> str | None:
    """The text of a default; None where it has none, or there is no default."""
    try:
        return canonical(default)
    except NoCanonicalForm:
        return None


def _binds_simply(signature: inspect.Signature) -> bool:
    return all(
        parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        for parameter in signature.parameters.values()
    )


def _parse(template: str, signature: inspect.Signature) -> list[tuple[str, str | None]]:
    """Literal texts of a template, each with the argument that follows it, if any."""
    accepted = (
        f"idempotency_key must be a template of literal text and {{argument}}, where an "
        f"argument is one of the task's ({', '.join(signature.parameters) or 'it has none'})"
    )
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as exc:
        raise ConfigurationError(f"{accepted}, got {template!r}: {exc}") from exc
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    found: list[tuple[str, str | None]] = []
    literal = ""
    for text, name, spec, conversion in parts:
        literal += text  # a doubled brace ends a part without a field
        if name is not None and (
            not name.isidentifier()
            or spec
            or conversion
            or (name not in signature.parameters and not takes_any)
        ):
            field = name + (f"!{conversion}" if conversion else "")
            field += f":{spec}" if spec else ""
            raise ConfigurationError(f"{accepted}, got {{{field}}} in {template!r}")
        if name is not None:
            found.append((literal, name))
            literal = ""
    if literal:
        found.append((literal, None))
    if not found or (signature.parameters and all(name is None for _, name in found)):
        raise ConfigurationError(
            f"{accepted}; without one all calls are the same effect, got {template!r}"
        )
    return found
