"""Sizes and routing of a mixture of experts, read from config.json."""

from __future__ import annotations

from dataclasses import dataclass

from workers.model.fields import Fields

__all__ = ["GateRule", "MoEConfig", "read_moe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRule:
    """How scores become a choice.

    `groups_kept` of `num_groups` groups take part; a group's score is the best of its experts (softmax gates) or the
    sum of its best two (sigmoid gates). Raises ValueError naming the configuration's field.
    """

    num_experts: int
    top_k: int
    sigmoid: bool
    num_groups: int = 1
    groups_kept: int = 1
    normalize: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"config.json: n_group {self.num_groups} does not divide n_routed_experts {self.num_experts}"
            )
        if not 1 <= self.groups_kept <= self.num_groups:
            raise ValueError(
                f"config.json: topk_group must be between 1 and n_group {self.num_groups}, not {self.groups_kept}"
            )
        eligible = self.groups_kept * (self.num_experts // self.num_groups)
        if not 1 <= self.top_k <= eligible:
            raise ValueError(
                f"config.json: num_experts_per_tok {self.top_k} exceeds the {eligible} experts of the kept groups"
            )
        if self.sigmoid and self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            raise ValueError(f"config.json: n_group {self.num_groups} leaves fewer than two experts in a group")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """Which layers have experts, how wide these are, and how tokens find them."""

    gate: GateRule
    correction_bias: bool  # the checkpoint has a bias per expert that only chooses
    expert_size: int  # inner width of a routed expert
    shared_size: int  # inner width of the shared experts together; 0: there are none
    first_layer: int  # layers before it are dense
    layer_step: int  # and so are those after it whose number this does not divide

    def has_experts(self, layer: int) -> bool:
        return layer >= self.first_layer and layer % self.layer_step == 0


def read_moe(fields: Fields, *, sigmoid: bool) -> MoEConfig | None:
    """None where the model has no routed experts. `sigmoid` says what the architecture's gate is unless it is told.

    With a softmax gate `norm_topk_prob` normalises before the scaling factor applies, as the sigmoid gate does;
    transformers ignores the field there, and every published checkpoint has it false.
    """
    num_experts = fields.optional_size("n_routed_experts")
    if num_experts is None:
        return None
    grouped, noaux = _method(fields, sigmoid)
    expert_size = fields.size("moe_intermediate_size")
    return MoEConfig(
        gate=GateRule(
            num_experts=num_experts,
            top_k=fields.size("num_experts_per_tok"),
            sigmoid=noaux,
            num_groups=fields.size("n_group", 1) if grouped else 1,
            groups_kept=fields.size("topk_group", 1) if grouped else 1,
            normalize=fields.flag("norm_topk_prob", sigmoid),
            scale=fields.number("routed_scaling_factor", 1.0),
        ),
        correction_bias=noaux,
        expert_size=expert_size,
        shared_size=fields.count("n_shared_experts", 0) * expert_size,
        first_layer=fields.count("first_k_dense_replace", 0),
        layer_step=fields.size("moe_layer_freq", 1),
    )


def _method(fields: Fields, sigmoid: bool) -> tuple[bool, bool]:
    """Whether the gate chooses among the best groups only, and whether it is the one with a correction bias."""
    scoring = fields.text("scoring_func", "sigmoid" if sigmoid else "softmax")
    method = fields.text("topk_method", "noaux_tc" if sigmoid else "greedy")
    built = {
        ("softmax", "greedy"): (False, False),
        ("softmax", "gready"): (False, False),  # so spelt in early configurations
        ("softmax", "group_limited_greedy"): (True, False),
        ("sigmoid", "noaux_tc"): (True, True),
    }
    if (scoring, method) not in built:
        raise ValueError(
            f"config.json: scoring_func {scoring!r} with topk_method {method!r} is not supported; supported: softmax "
            "with greedy or group_limited_greedy, sigmoid with noaux_tc"
        )
    return built[scoring, method]
