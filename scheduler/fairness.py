"""A queue that shares a DP group fairly among tenants: the virtual token counter.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588), algorithm 2: the tenant
that got the least service so far is next, where service is counted in tokens as they are computed. A tenant that comes
back is lifted to the least among those who wait, so that credit from idle times does not pile up. Between tenants with
work, the difference stays bounded, and no one starves.

Classes of priority come before tenants, and the order of the sequences' keys rules within one tenant's class.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import count

from scheduler.heap import RemovableHeap
from scheduler.sequence import Sequence
from scheduler.tenants import Account, FairnessSettings

__all__ = ["FairQueue"]

_MANY_ACCOUNTS = 1024


class _Class:
    """The waiting sequences of one priority, by tenant.

    `heap` holds each tenant with what its service once was: as service only grows, the first entry that is up to date
    is the least.
    """

    def __init__(self) -> None:
        self.lines: dict[str, RemovableHeap[Sequence]] = {}
        self.heap: list[tuple[float, int, str]] = []
        self.listed: set[str] = set()


class FairQueue:
    """A WaitingQueue and a Ledger."""

    def __init__(self, settings: FairnessSettings, *, block_size: int) -> None:
        self._settings = settings
        self._block_size = block_size
        self._accounts: dict[str, Account] = {}
        self._classes: dict[int, _Class] = {}
        self._last_service = 0.0  # of the tenant that was the last to have nothing waiting
        self._waiting: dict[Sequence, None] = {}
        self._num_tokens = 0
        self._tickets = count()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def service_of(self, tenant: str) -> float:
        """The tenant's virtual token counter."""
        return self._account(tenant).service

    def refusal(self, sequence: Sequence) -> str | None:
        """Why its tenant may not queue this sequence; None where it may."""
        account = self._account(sequence.request.tenant)
        limits, num_tokens = account.limits, len(sequence.token_ids)
        num_open = account.num_waiting + account.num_running
        if 0 < limits.max_blocks < self._reservation(sequence):
            return (
                f"the request may need {self._reservation(sequence)} KV blocks; its tenant may hold {limits.max_blocks}"
            )
        if 0 < limits.max_requests <= num_open:
            return f"the tenant has {num_open} requests open, the most it may have"
        if account.num_waiting and 0 < limits.max_queued_tokens < account.num_waiting_tokens + num_tokens:
            return f"the tenant has {account.num_waiting_tokens} tokens queued; it may have {limits.max_queued_tokens}"
        return None

    def push(self, sequence: Sequence) -> None:
        tenant, num_tokens = sequence.request.tenant, len(sequence.token_ids)
        account = self._account(tenant)
        if not account.num_waiting:
            account.service = max(account.service, self._least_service())
        account.num_waiting += 1
        account.num_waiting_tokens += num_tokens
        self._waiting[sequence] = None
        self._num_tokens += num_tokens
        of_class = self._classes.setdefault(sequence.request.priority, _Class())
        of_class.lines.setdefault(tenant, RemovableHeap()).push(sequence.order, sequence)
        if tenant not in of_class.listed:
            of_class.listed.add(tenant)
            heapq.heappush(of_class.heap, (account.service, next(self._tickets), tenant))

    def peek(self) -> Sequence | None:
        for priority in sorted(self._classes):
            sequence = self._next_of(self._classes[priority])
            if sequence is not None:
                return sequence
        return None

    def remove(self, sequence: Sequence) -> None:
        tenant, num_tokens = sequence.request.tenant, len(sequence.token_ids)
        of_class = self._classes[sequence.request.priority]
        line = of_class.lines[tenant]
        removed = line.discard(sequence)
        assert removed, f"{sequence.key} is not in the queue"
        del self._waiting[sequence]
        self._num_tokens -= num_tokens
        account = self._accounts[tenant]
        account.num_waiting -= 1
        account.num_waiting_tokens -= num_tokens
        if not account.num_waiting:
            self._last_service = account.service
        if not line:
            del of_class.lines[tenant]
            if not of_class.lines:
                del self._classes[sequence.request.priority]

    def ahead_of(self, sequence: Sequence) -> tuple[int, int]:
        """As far as can be told: more urgent classes, the tenant's own line, and as many of every other tenant's."""
        tenant, priority = sequence.request.tenant, sequence.request.priority
        urgent = [one for one in self._waiting if one.request.priority < priority]
        own = [one for one in self._classes[priority].lines[tenant] if one.order < sequence.order]
        num_ahead = len(urgent) + len(own)
        num_tokens = sum(len(one.token_ids) for one in urgent) + sum(len(one.token_ids) for one in own)
        for name, line in self._classes[priority].lines.items():
            if name != tenant:
                num = min(len(line), len(own) + 1)
                num_ahead += num
                num_tokens += sum(len(one.token_ids) for one in line) * num // len(line)
        return num_ahead, num_tokens

    def admitted(self, sequence: Sequence, num_tokens: int) -> None:
        """A sequence that was removed runs from now on; `num_tokens` of its history will be computed for it."""
        account = self._accounts[sequence.request.tenant]
        account.num_running += 1
        account.num_reserved_blocks += self._reservation(sequence)
        account.service += num_tokens / account.limits.weight
        if not account.num_waiting:
            self._last_service = account.service

    def served(self, sequences: Iterable[Sequence]) -> None:
        """Each of these running sequences got a token."""
        cost, accounts = self._settings.output_cost, self._accounts
        for sequence in sequences:
            account = accounts[sequence.request.tenant]
            account.service += cost / account.limits.weight

    def left(self, sequence: Sequence) -> None:
        """A sequence that was admitted does not run any more."""
        account = self._accounts[sequence.request.tenant]
        account.num_running -= 1
        account.num_reserved_blocks -= self._reservation(sequence)
        if len(self._accounts) > _MANY_ACCOUNTS:
            self._forget_idle()

    def _next_of(self, of_class: _Class) -> Sequence | None:
        """The first sequence of the least served tenant that may hold the blocks for it."""
        heap, passed = of_class.heap, []
        found = None
        while heap and found is None:
            service, ticket, tenant = heap[0]
            line = of_class.lines.get(tenant)
            if line is None:
                heapq.heappop(heap)
                of_class.listed.discard(tenant)
                continue
            account = self._accounts[tenant]
            if service < account.service:
                heapq.heapreplace(heap, (account.service, ticket, tenant))
                continue
            head = line.peek()
            assert head is not None
            if 0 < account.limits.max_blocks < account.num_reserved_blocks + self._reservation(head[1]):
                passed.append(heapq.heappop(heap))
                continue
            found = head[1]
        for entry in passed:
            heapq.heappush(heap, entry)
        return found

    def _least_service(self) -> float:
        """What a tenant without waiting sequences is lifted to."""
        if not self._waiting:
            return self._last_service
        return min(account.service for account in self._accounts.values() if account.num_waiting)

    def _reservation(self, sequence: Sequence) -> int:
        """Blocks that a sequence may come to hold; its last token needs no place in the cache."""
        num_tokens = sequence.num_prompt_tokens + sequence.max_output_tokens - 1
        return -(-num_tokens // self._block_size)

    def _account(self, tenant: str) -> Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(self._settings.limits_of(tenant))
        return account

    def _forget_idle(self) -> None:
        """Drop the accounts that a return would lift anyway."""
        least = self._least_service()
        for tenant in [name for name, account in self._accounts.items() if account.idle and account.service <= least]:
            del self._accounts[tenant]
