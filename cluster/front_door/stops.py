"""Stop strings, found in text that arrives in pieces.

The result is a function of the whole text, never of where the pieces begin and end: the stop string that is
completed first wins, the longest where two are completed by the same character. That is also what makes a replayed
stream stop where the first one would have.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopScanner"]


class StopScanner:
    """Holds back text that may turn out to be the beginning of a stop string."""

    __slots__ = ("_held", "_include", "_prefixes", "_stops", "_tail", "_tail_chars", "matched")

    def __init__(self, stops: Sequence[str], *, include_in_output: bool) -> None:
        assert stops
        assert all(stops)
        # Longest first: the first that ends at a given character is then the longest that does.
        self._stops = sorted(stops, key=len, reverse=True)
        self._prefixes = frozenset(stop[:end] for stop in stops for end in range(1, len(stop)))
        self._include = include_in_output
        self._tail_chars = len(self._stops[0]) - 1
        self._tail = ""  # the end of the text seen, released or not: where a match may begin
        self._held = 0  # how many of the tail's last characters were not released
        self.matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """The text that may be released now; after a match `matched` is set and nothing more follows.

        Only a stop string that ends within armed text counts.
        """
        assert self.matched is None
        if not text:
            return ""
        window = self._tail + text
        start = len(self._tail) - self._held
        if armed and (found := self._find(window, len(self._tail))) is not None:
            begin, end = found
            self.matched = window[begin:end]
            self._held = 0
            return window[start : end if self._include else begin]
        held = 0 if self._include else self._held_chars(window)
        self._tail = window[-self._tail_chars :] if self._tail_chars else ""
        self._held = held
        return window[start : len(window) - held]

    def finish(self) -> str:
        """What was held back, now that no text follows."""
        held, self._held = self._held, 0
        return self._tail[len(self._tail) - held :]

    def _find(self, window: str, seen: int) -> tuple[int, int] | None:
        """Begin and end of the match that ends first, behind the first `seen` characters."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            begin = window.find(stop, max(0, seen - len(stop) + 1))
            if begin >= 0 and (best is None or begin + len(stop) < best[1]):
                best = (begin, begin + len(stop))
        return best

    def _held_chars(self, window: str) -> int:
        """The length of the longest end of `window` that begins a stop string."""
        for size in range(min(self._tail_chars, len(window)), 0, -1):
            if window[-size:] in self._prefixes:
                return size
        return 0
