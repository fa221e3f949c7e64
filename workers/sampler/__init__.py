"""From logits to tokens.

sampler      one step's rows: which path each takes
adjust       logit bias, penalties and forbidden tokens, before the temperature
allow        what a grammar leaves, after that
candidates   what top-k, top-p and min-p leave
noise        the randomness, a pure function of (seed, position, token id)
logprobs     what the model itself said, before any of the above
"""

from __future__ import annotations

from workers.sampler.sampler import Sampler

__all__ = ["Sampler"]
