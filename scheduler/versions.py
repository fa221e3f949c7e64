"""Which version of the engines a request goes to, where several serve at once: shares, as a pure function."""

from __future__ import annotations

from collections.abc import Collection, Mapping

__all__ = ["pick_version", "shares_of"]


def pick_version(
    there: Collection[str], weights: Mapping[str, float], point: float, *, keep: str | None = None
) -> str | None:
    """One of the versions that are `there`, for a `point` drawn evenly from [0, 1); None where none is.

    A version without a weight has 1. Where all that are there have 0, they are equal: an answer from the wrong one is
    better than none. `keep` is the version that has begun the request: it goes on there while that is there.
    """
    if keep is not None and keep in there:
        return keep
    shares = shares_of(there, weights)
    left = point
    for name, share in shares.items():
        if left < share:
            return name
        left -= share
    # Rounding can leave a sliver behind the last one.
    return next((name for name, share in reversed(shares.items()) if share > 0), None)


def shares_of(there: Collection[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Each version's part of the requests, by name; together 1."""
    shares = {name: max(0.0, weights.get(name, 1.0)) for name in sorted(there)}
    if not sum(shares.values()):
        shares = dict.fromkeys(shares, 1.0)
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}
