"""The common beat of an engine's DP groups, so that all ranks of a stage enter an expert exchange together.

Before a step each group's first rank tells the others how many tokens it brings, and hears theirs. If anybody brings
any, all run the step, those without work too; if nobody does, all sleep. The message of the next beat is also what
wakes the sleepers: there is nothing to poll.

Several times within the step timeout each group also says that its process runs, asleep or in a step. So a step may
take long, and a process that is frozen or out of reach is noticed by its silence.

    ran = pulse.beat(num_tokens)      one beat; whether there is a step to run
    pulse.announce(num_tokens)        this group's part of the next beat, ahead of it: nobody will wait for it then
    pulse.offer(epoch)                this group is ready for that placement of the experts, from any thread
    pulse.agreed                      the epoch that every group offered to the last beat: all switch before its step
    pulse.pending                     whether a beat must follow even without work of one's own
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from workers.parallel.liveness import stuck_after_s

__all__ = ["Pulse"]

_BEAT = struct.Struct("!QQIQ")  # generation, beat (0: none, only that the process runs), tokens, epoch offered
_LOOK_S = 0.25
_RECENT_STEPS = 0.02  # the weight of the last step in what is told of the last ones
_LOOKS_PER_TIMEOUT = 5


class Pulse:
    """One group's end. `beat` belongs to the step loop; `on_wake` is called from another thread, and must not block.

    `peers` are connected sockets by rank. A peer that goes, is silent for `timeout_s` or is of another generation makes
    `beat` raise RuntimeError; `on_gone` hears of it even while the group sleeps. `beat` also gives up where a peer
    that runs brings nothing for `stuck_s`.
    """

    def __init__(
        self,
        generation: int,
        peers: Mapping[int, socket.socket],
        *,
        timeout_s: float,
        stuck_s: float | None = None,
        on_wake: Callable[[], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self._generation = generation
        self._peers = dict(peers)
        self._timeout_s = timeout_s
        self._stuck_s = stuck_after_s(timeout_s) if stuck_s is None else stuck_s
        self._look_s = min(_LOOK_S, timeout_s / _LOOKS_PER_TIMEOUT)
        self._sending = threading.Lock()  # a message must not begin within another
        self._on_wake = on_wake
        self._on_gone = on_gone
        self._changed = threading.Condition()
        self._heard: dict[int, deque[tuple[int, int, int]]] = {rank: deque() for rank in peers}
        self._heard_s: dict[int, float] = {}
        self._beat = 0
        self._ran = False
        self._offer = 0
        self._untold = False  # an offer that no beat has carried
        self._announced: tuple[int, int] | None = None  # tokens and offer, as the others have heard of the next beat
        self.agreed = 0
        self._tokens: dict[int, int] = dict.fromkeys(peers, 0)
        self._most_tokens = self._mean_tokens = 0.0
        self._reason: str | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="pulse", daemon=True)

    @property
    def pending(self) -> bool:
        """Whether the last beat ran a step, another group has begun the next one, or they must hear of an offer."""
        return self._ran or self._untold or self._announced is not None or any(self._heard.values())

    @property
    def awaited(self) -> bool:
        """Whether another group has begun the next beat, or they must hear of an offer."""
        return self._untold or any(self._heard.values())

    @property
    def tokens(self) -> Mapping[int, int]:
        """What each peer brought to the last beat."""
        return self._tokens

    @property
    def imbalance(self) -> float:
        """Tokens of the fullest group in the last steps over the mean of all groups: 1 is even, 0 before a step."""
        return self._most_tokens / self._mean_tokens if self._mean_tokens else 0.0

    def start(self) -> None:
        self._thread.start()

    def offer(self, epoch: int) -> None:
        """Says in every beat from now on that this group can switch to `epoch`, until all do. From any thread."""
        with self._changed:
            self._offer, self._untold = epoch, True
        self._on_wake()

    def beat(self, num_tokens: int) -> bool:
        """Exchanges token counts with every group; True where any brings some. Raises RuntimeError.

        What was announced stands, whatever `num_tokens` has become.
        """
        num_tokens, offer = self._announced or self._send(num_tokens)
        self._announced = None
        with self._changed:
            self._changed.wait_for(lambda: self._reason or all(self._heard.values()), self._stuck_s)
            silent = [rank for rank, heard in self._heard.items() if not heard]
            if silent:
                raise RuntimeError(self._reason or f"ranks {silent} missed a beat for {self._stuck_s:g} s")
            offers = {offer}
            for rank, heard in self._heard.items():
                beat, self._tokens[rank], theirs = heard.popleft()
                assert beat == self._beat, f"rank {rank} is at beat {beat}, this one at {self._beat}"
                offers.add(theirs)
            self.agreed = offer if len(offers) == 1 else 0
            if self.agreed == self._offer:
                self._offer = 0
        counts = (num_tokens, *self._tokens.values())
        self._ran = any(counts)
        if self._ran:
            self._most_tokens += _RECENT_STEPS * (max(counts) - self._most_tokens)
            self._mean_tokens += _RECENT_STEPS * (sum(counts) / len(counts) - self._mean_tokens)
        return self._ran

    def announce(self, num_tokens: int) -> None:
        """Says now what this group will bring to the next beat: it must beat then. Raises RuntimeError."""
        assert self._announced is None
        self._announced = self._send(num_tokens)

    def _send(self, num_tokens: int) -> tuple[int, int]:
        """Tells the others of the next beat; the tokens and the offer that they hear of."""
        self._beat += 1
        with self._changed:
            offer, self._untold = self._offer, False
        message = _BEAT.pack(self._generation, self._beat, num_tokens, offer)
        for rank, peer in self._peers.items():
            try:
                with self._sending:
                    peer.sendall(message)
            except OSError as error:
                raise RuntimeError(f"rank {rank} has gone") from error
        return num_tokens, offer

    def close(self) -> None:
        """From any thread; whoever waits in `beat` gets RuntimeError."""
        self._closed = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # it has gone already
                peer.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        for peer in self._peers.values():
            peer.close()

    def _listen(self) -> None:
        unread = {rank: bytearray() for rank in self._peers}
        looked_s = told_s = time.monotonic()
        self._heard_s = dict.fromkeys(self._peers, looked_s)
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while not self._closed and self._reason is None:
                for key, _ in selector.select(self._look_s):
                    self._read(key.data, unread[key.data])
                now_s = time.monotonic()
                if now_s - told_s >= self._look_s:
                    told_s = now_s
                    self._tell()
                if now_s - looked_s > self._timeout_s / 2:
                    # This process itself was held up: what it has not heard says nothing about the others.
                    self._heard_s = dict.fromkeys(self._peers, now_s)
                looked_s = now_s
                for rank, heard_s in self._heard_s.items():
                    if now_s - heard_s > self._timeout_s:
                        self._fail(f"rank {rank} was silent for {self._timeout_s:g} s")
                        break

    def _tell(self) -> None:
        """Says that this process runs."""
        message = _BEAT.pack(self._generation, 0, 0, 0)
        for peer in self._peers.values():
            # That it has gone shows when it is read.
            with contextlib.suppress(OSError), self._sending:
                peer.sendall(message)

    def _read(self, rank: int, unread: bytearray) -> None:
        try:
            data = self._peers[rank].recv(4096)
        except OSError:
            data = b""
        if not data:
            self._fail(f"rank {rank} has gone")
            return
        self._heard_s[rank] = time.monotonic()
        woken = False
        unread += data
        while len(unread) >= _BEAT.size:
            generation, beat, num_tokens, epoch = _BEAT.unpack_from(unread)
            del unread[: _BEAT.size]
            if generation != self._generation:
                self._fail(f"rank {rank} is of generation {generation}, not {self._generation}")
                return
            if not beat:
                continue
            woken = True
            with self._changed:
                self._heard[rank].append((beat, num_tokens, epoch))
                self._changed.notify_all()
        if woken:
            self._on_wake()

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._reason = reason
            self._changed.notify_all()
        if not self._closed:
            self._on_gone(reason)
