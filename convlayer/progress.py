"""Long work shows how far it is: by a bar where tqdm is installed, otherwise in the log.

    with convlayer.progress.shown():
        layer(values)

Whoever works off rows tracks them; where nobody asked to be shown, that is a look at one variable.
The log is that of `logging.getLogger("convlayer")`, level INFO; where it does not take such lines,
they go to the standard error, since they were asked for.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

try:
    from tqdm import tqdm
except ImportError:  # it is optional
    tqdm = None

# Work that ends within so many seconds shows nothing.
AT_FIRST = 1.0
# Two lines of the log are so many seconds apart.
BETWEEN = 5.0
LOG = logging.getLogger("convlayer")


class Silent:
    """Work that nobody watches."""

    watched = False

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        pass

    def advance(self, rows: int) -> None:
        """So many rows more are done."""

    def note(self, words: str) -> None:
        """What is being done, for rows that take long."""


SILENT = Silent()
_WANTED = Silent()  # the same, but the next work that is begun is to be shown
_work: ContextVar[Silent] = ContextVar("work", default=SILENT)


@contextmanager
def shown(wanted: bool = True) -> Iterator[None]:
    """`with shown(): ...`: the rows that layers work off inside are shown; with `wanted` false they
    are not, whatever stands around it."""
    before = _work.set(_WANTED if wanted else SILENT)
    try:
        yield
    finally:
        _work.reset(before)


def track(title: str, total: int) -> Silent:
    """`with track("clarabel", 2000) as work: ...; work.advance(10)`: the rows of some work.

    Rows of work inside shown work are not shown: they are its rows, in pieces.
    """
    state = _work.get()
    if state is SILENT:
        return SILENT
    return _Shown(title, total) if state is _WANTED else _Inside()


def current() -> Silent:
    """The work that this thread takes part in."""
    return _work.get()


class _Inside(Silent):
    """Work that is a part of what is shown already."""

    def __enter__(self) -> Silent:
        self._before = _work.set(SILENT)
        return SILENT

    def __exit__(self, *_: object) -> None:
        _work.reset(self._before)


class _Shown(Silent):
    """Work that is shown; rows and notes come from any thread."""

    watched = True

    def __init__(self, title: str, total: int) -> None:
        self.total, self.done, self._lock = total, 0, threading.Lock()
        self._view = _Lines(title, total) if tqdm is None else _Bar(title, total)

    def __enter__(self) -> Silent:
        self._before = _work.set(self)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        _work.reset(self._before)
        if error is None:  # some rows may have ended without being counted
            self.advance(self.total - self.done)
        self._view.close()

    def advance(self, rows: int) -> None:
        with self._lock:
            rows = min(rows, self.total - self.done)
            self.done += rows
            self._view.advance(rows)

    def note(self, words: str) -> None:
        with self._lock:
            self._view.note(words)


class _Bar:
    """By tqdm."""

    def __init__(self, title: str, total: int) -> None:
        # miniters: rows that take long are shown at their notes
        self._bar = tqdm(total=total, desc=title, unit="row", delay=AT_FIRST, miniters=0)

    def advance(self, rows: int) -> None:
        self._bar.update(rows)

    def note(self, words: str) -> None:
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(0)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """By lines of the log."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done, self._words = title, total, 0, ""
        self._start = time.monotonic()
        self._next = self._start + AT_FIRST
        self._told = False

    def advance(self, rows: int) -> None:
        self._done += rows
        self._look()

    def note(self, words: str) -> None:
        self._words = words
        self._look()

    def close(self) -> None:
        """The last line, where there was one before and it does not say so already."""
        if self._told and not self._whole:
            self._tell()

    def _look(self) -> None:
        if time.monotonic() >= self._next:
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        self._told, self._whole, self._next = True, self._done == self._total, now + BETWEEN
        spent = now - self._start
        left = spent / self._done * (self._total - self._done) if self._done else None
        parts = [f"{self._title}: {self._done} of {self._total} rows after {spent:.0f} s"]
        parts += [f"about {left:.0f} s to go"] if left is not None and left >= 0.5 else []
        parts += [self._words] if self._words else []
        _say(", ".join(parts))


def _say(line: str) -> None:
    if LOG.isEnabledFor(logging.INFO):
        LOG.info(line)
    else:
        print(line, file=sys.stderr)
