"""Reads a process's memory with psutil, where there is no /proc."""

from __future__ import annotations

from typing import Any

from celery_resilience.errors import MissingExtra
from celery_resilience.memory.proc import Usage


def _psutil() -> Any:
    """
    The library.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        import psutil  # type: ignore[import-untyped]
    except ModuleNotFoundError as exc:
        raise MissingExtra.of("psutil", "all", "memory without /proc") from exc
    return psutil


class PsutilMemory:
    """
    The memory of the process that makes it.

    Resident memory stands for its own, and nobody knows the peak of a run.
    """

    def __init__(self) -> None:
        self._process = _psutil().Process()

    def read(self) -> Usage:
        """Tens of microseconds."""
        resident_kib = self._process.memory_info().rss // 1024
        return Usage(resident_kib, resident_kib, resident_kib)

    def forget_peak(self) -> None:
        """Nothing: there is no such door."""

    def peak_kib(self) -> int | None:
        """Nobody knows."""
        return None

    def close(self) -> None:
        """Nothing is held."""


def own_kib_of(pid: int) -> int | None:
    """Another process's resident memory; None: it has ended."""
    psutil = _psutil()
    try:
        return int(psutil.Process(pid).memory_info().rss) // 1024
    except psutil.Error:
        return None


def rss_mib_of(pid: int) -> float | None:
    """The same in MiB."""
    kib = own_kib_of(pid)
    return None if kib is None else round(kib / 1024, 1)
