"""How far a long task has come: a bar in a terminal or notebook, a line a minute in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

EVERY = 60.0
"""Seconds between the lines of a log file."""
_BRIEF = 10.0  # seconds of a task of which no log file tells
T = TypeVar("T")


class Progress:
    """Counts what is done, on stderr.

    Args:
        label: of the task.
        total: to be done.
        unit: of what is counted.
        done: of the total, before this process.
    """

    def __init__(self, label: str, total: int, unit: str = "image", done: int = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._before, self._start, self._told = done, time.monotonic(), ""
        self._next = self._start + EVERY
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty() or "ipykernel" in sys.modules:
            self._bar = tqdm(desc=label, total=total, unit=f" {unit}", initial=done, dynamic_ncols=True)

    def update(self, count: int = 1) -> None:
        """Count as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            self._print(self._line())

    def tell(self, label: str, told: str) -> None:
        """Go on under another label, and show how it goes behind the count."""
        self.label, self._told = label, told
        if self._bar is not None:
            self._bar.set_description(self.label, refresh=False)
            self._bar.set_postfix_str(told)

    def close(self) -> None:
        """Say that it is over, or where it stopped."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            return
        seconds, count = time.monotonic() - self._start, self.done - self._before
        if seconds < _BRIEF:
            return
        of = "" if self.done >= self.total else f" of {self.total:,}"
        done = f"{self.done:,}{of} {self._units()}"
        self._print(f"{self.label}: {done} in {duration(seconds)}{self._rate(count, seconds)}")

    def _line(self) -> str:
        seconds, count = time.monotonic() - self._start, self.done - self._before
        left = seconds * (self.total - self.done) / count if count else 0.0
        rest = f", about {duration(left)} left" if count else ""
        told = f"; {self._told}" if self._told else ""
        return f"{self.label}: {self.done:,} of {self.total:,} {self._units()}{self._rate(count, seconds)}{rest}{told}"

    def _units(self) -> str:
        return f"{self.unit}s"

    def _rate(self, count: int, seconds: float) -> str:
        return f", {significant(count / seconds, 3)} a second" if count and seconds >= 1 else ""

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def track(items: Iterable[T], label: str, total: int, unit: str = "image") -> Iterator[T]:
    """The items, counted as they are taken; nothing is said where there are none."""
    if not total:
        yield from items
        return
    progress = Progress(label, total, unit)
    try:
        for item in items:
            yield item
            progress.update()
    finally:
        progress.close()


def significant(value: float, digits: int) -> str:
    """So many significant digits without an exponent, which ``:.3g`` has from 1,000 on: 98.2, 0.092, 1,200."""
    return f"{float(f'{value:.{digits}g}'):,g}"


def duration(seconds: float) -> str:
    """In words, such as ``2 h 05 min``, ``4 min`` and ``12 s``."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
