"""What a worker's main process knows of circuits, for its children to read.

Memory that forked children share, without a lock: a torn read is noticed by its
checksum. A circuit has the slot that its name says; where that is another's, it is not
shared, and each child reads it for itself.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from celery_resilience.circuits.store import Stored

#: Slots, and bytes of each; a state that needs more is not shared.
SLOTS = 64
SLOT = 4_096

#: Bytes of a name: 64 characters of four bytes, and its checksum.
_NAME = struct.Struct("I256s")
_TIME = struct.Struct("d")
_HEAD = struct.Struct("IIdd")

_USED = _NAME.size
_NOTE = _USED + _TIME.size


class Note(NamedTuple):
    """
    A circuit as it was read from the store.

    Attributes:
        stored: What was read.
        read_at: By the monotonic clock, which is one for all processes of a host.
        offset: Of the store's clock from it.
    """

    stored: Stored
    read_at: float
    offset: float


class Page:
    """The slots, and when the main process looked at them last."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, (SLOTS + 1) * SLOT)

    def beat(self, now: float) -> None:
        """The main process reads."""
        _TIME.pack_into(self._memory, SLOTS * SLOT, now)

    def beaten_at(self) -> float:
        """When the main process said so last."""
        (at,) = _TIME.unpack_from(self._memory, SLOTS * SLOT)
        return float(at)

    def use(self, name: str, now: float) -> bool:
        """
        Say that somebody wants to know of a circuit.

        Returns:
            Whether it is shared.
        """
        start, said = _start(name), _packed(name)
        if self._memory[start : start + _NAME.size] != said:
            if self._name_at(start) is not None:
                return False
            self._memory[start : start + _NAME.size] = said
        _TIME.pack_into(self._memory, start + _USED, now)
        return True

    def used(self) -> Iterator[tuple[str, float]]:
        """The circuits that are shared, and when somebody wanted to know last."""
        for slot in range(SLOTS):
            name = self._name_at(slot * SLOT)
            if name is not None:
                (at,) = _TIME.unpack_from(self._memory, slot * SLOT + _USED)
                yield name, at

    def write(self, name: str, note: Note) -> None:
        """Tell the children; the main process alone writes."""
        body = f"{name}\n{note.stored.version}\n{note.stored.text}".encode()
        start = _start(name) + _NOTE
        if _NOTE + _HEAD.size + len(body) > SLOT:
            return
        crc = _crc(body, note.read_at, note.offset)
        head = _HEAD.pack(crc, len(body), note.read_at, note.offset)
        self._memory[start : start + len(head) + len(body)] = head + body

    def read(self, name: str) -> Note | None:
        """What was told last; None where there is nothing, or it is being written."""
        start = _start(name) + _NOTE
        crc, length, read_at, offset = _HEAD.unpack_from(self._memory, start)
        start += _HEAD.size
        body = self._memory[start : start + min(length, SLOT)]
        if not length or crc != _crc(body, read_at, offset):
            return None
        whose, version, text = body.decode().split("\n", 2)
        return Note(Stored(version, text), read_at, offset) if whose == name else None

    def _name_at(self, start: int) -> str | None:
        crc, name = _NAME.unpack_from(self._memory, start)
        name = name.rstrip(b"\0")
        return name.decode() if name and crc == zlib.crc32(name) else None


def _start(name: str) -> int:
    return zlib.crc32(name.encode()) % SLOTS * SLOT


def _packed(name: str) -> bytes:
    encoded = name.encode()
    return _NAME.pack(zlib.crc32(encoded), encoded)


def _crc(body: bytes, read_at: float, offset: float) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("dd", read_at, offset)))
