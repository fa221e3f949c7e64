"""Which experts a token goes to, and with what weight.

One function of (logits, rule, correction bias); the rule is read from the checkpoint's configuration once.
Sources: DeepSeek-V2 (arXiv 2405.04434) eq. 20-22 and section 2.2.2 for softmax gates with group-limited routing;
DeepSeek-V3 (arXiv 2412.19437) eq. 12-16 for sigmoid gates whose correction bias only chooses.
"""

from __future__ import annotations

import torch

from workers.model.moe_config import GateRule
from workers.parallel.dispatch import Routing

__all__ = ["GateRule", "choose_experts"]


def choose_experts(logits: torch.Tensor, rule: GateRule, correction_bias: torch.Tensor | None = None) -> Routing:
    """Routes each row of `logits` [T, num_experts].

    Ids come out ascending, so that a token's expert outputs are always summed in the same order, wherever the
    experts live.
    """
    logits = logits.float()
    scores = logits.sigmoid() if rule.sigmoid else logits.softmax(dim=-1)
    ranked = scores if correction_bias is None else scores + correction_bias
    if rule.groups_kept < rule.num_groups:
        ranked = _mask_weak_groups(ranked, rule)
    chosen = ranked.topk(rule.top_k, dim=-1, sorted=False).indices
    expert_ids = chosen.sort(dim=-1).values
    weights = scores.gather(-1, expert_ids)
    if rule.normalize and rule.top_k > 1:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(expert_ids, weights * rule.scale)


def _mask_weak_groups(ranked: torch.Tensor, rule: GateRule) -> torch.Tensor:
    """`ranked` with the experts of every group but the best `groups_kept` put out of reach."""
    num_tokens, num_experts = ranked.shape
    grouped = ranked.view(num_tokens, rule.num_groups, num_experts // rule.num_groups)
    if rule.sigmoid:
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    else:
        group_scores = grouped.amax(dim=-1)
    kept = group_scores.topk(rule.groups_kept, dim=-1, sorted=False).indices
    weak = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(weak.unsqueeze(-1), float("-inf")).view(num_tokens, num_experts)
