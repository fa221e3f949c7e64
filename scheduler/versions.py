"""Which version of the engines a request goes to, where several serve at once: shares, as a pure function."""

from __future__ import annotations

from collections.abc import Collection, Mapping

__all__ = ["pick_version"]


def pick_version(
    there: Collection[str], weights: Mapping[str, float], point: float, *, keep: str | None = None
) -> str | None:
    """One of the versions that are `there`, for a `point` drawn evenly from [0, 1); None where none is.

    A version without a weight has 1. Where all that are there have 0, they are equal: an answer from the wrong one is
    better than none. `keep` is the version that has begun the request: it goes on there while that is there.
    """
    if keep is not None and keep in there:
        return keep
    names = sorted(there)
    shares = [max(0.0, weights.get(name, 1.0)) for name in names]
    total = sum(shares)
    if total <= 0:
        shares, total = [1.0] * len(names), float(len(names))
    left = point * total
    for name, share in zip(names, shares, strict=True):
        if left < share:
            return name
        left -= share
    # Rounding can leave a sliver behind the last one.
    return next((name for name, share in zip(reversed(names), reversed(shares), strict=True) if share > 0), None)
