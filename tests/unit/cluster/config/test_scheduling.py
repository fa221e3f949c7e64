"""The `scheduling` section: what it may say, and what batchers and front doors are told."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

import pytest

from cluster.config import ConfigError, parse
from cluster.config.scheduling import front_door_limits, resolve_overlap, resolve_routing, scheduling_settings
from cluster.config.schema import Routing
from scheduler.policy import ORDERS
from scheduler.routing import POLICIES
from scheduler.settings import SchedulingSettings
from scheduler.tenants import FairnessSettings, TenantLimits
from workers.parallel.plan import ParallelPlan

KEYS = {"security": {"api_key": {"alice": "secret-one", "bob": "secret-two"}}}


def settings(section: dict[str, Any], **others: Any) -> SchedulingSettings:
    return scheduling_settings(parse({"scheduling": section, **others}))


def test_the_defaults() -> None:
    chosen = settings({})
    assert (chosen.prefix_cache, chosen.share_prefixes, chosen.order) == (True, False, "deadline")
    assert (chosen.refuse_late, chosen.target_step_s, chosen.fairness) == (True, 0.0, None)


def test_every_choice_reaches_the_batcher() -> None:
    section = {
        "prefix_cache": True,
        "share_prefixes": True,
        "prefix_wait_tokens": 7,
        "target_step_s": 0.25,
        "min_chunk_tokens": 9,
        "max_prefills": 3,
        "order": "arrival",
        "max_waiting": 11,
        "max_waiting_tokens": 12,
        "max_queue_s": 13.5,
        "refuse_late": False,
        "preempt_lower": True,
    }
    chosen = asdict(settings(section))
    assert {name: chosen[name] for name in section} == section
    assert set(chosen) - set(section) == {"max_prompt_logits", "fairness"}


def test_what_can_be_named_exists() -> None:
    assert set(get_args(Routing)) == set(POLICIES)
    assert all(parse({"scheduling": {"order": name}}) for name in ORDERS)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"prefix_cach": True},
            "prefix_cach: unknown key; the nearest known key is scheduling.prefix_cache",
        ),
        ({"routing": "random"}, "scheduling.routing: must be"),
        ({"target_step_s": -1}, "scheduling.target_step_s: must be greater than or equal to 0"),
        ({"max_waiting": 0}, "scheduling.max_waiting: must be greater than or equal to 1"),
        (
            {"fairness": {"tenants": {"alice": {"weight": 0}}}},
            "fairness.tenants.alice.weight: must be greater",
        ),
        ({"fairness": {"output_cst": 1}}, "scheduling.fairness.output_cst: unknown key; .*fairness.output_cost"),
    ],
)
def test_mistakes_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({"scheduling": section})


def test_the_old_place_of_a_key_is_told() -> None:
    with pytest.raises(ConfigError, match=r"inference\.max_waiting: unknown key"):
        parse({"inference": {"max_waiting": 4}})


def test_several_keys_are_tenants() -> None:
    assert settings({}, security={"api_key": "only-one"}).fairness is None
    assert settings({}, **KEYS).fairness == FairnessSettings()
    assert settings({"fairness": None}, **KEYS).fairness is None
    weighted = settings({"fairness": {"output_cost": 3, "tenants": {"bob": {"weight": 2, "max_requests": 4}}}}, **KEYS)
    assert weighted.fairness == FairnessSettings(
        tenants={"bob": TenantLimits(weight=2.0, max_requests=4)}, output_cost=3.0
    )


@pytest.mark.parametrize(
    ("section", "others", "message"),
    [
        (
            {"fairness": {"tenants": {"carol": {}}}},
            KEYS,
            r"tenants\.carol: no API key .*; there are alice, bob",
        ),
        ({"fairness": {"tenants": {"carol": {}}}}, {}, r"tenants\.carol: .*give security\.api_key names"),
        ({"prefix_cache": False, "share_prefixes": True}, {}, r"share_prefixes: .*set scheduling\.prefix_cache: true"),
    ],
)
def test_what_cannot_be_is_refused(section: dict[str, Any], others: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(section, **others)


def test_routing_follows_the_plan() -> None:
    config, wide = parse({}), ParallelPlan(data=2)
    assert resolve_routing(config, ParallelPlan(), spreads_experts=True) == "prefix-affinity"
    assert resolve_routing(config, wide, spreads_experts=False) == "prefix-affinity"
    assert resolve_routing(config, wide, spreads_experts=True) == "prefix-affinity-even-steps"
    chosen = parse({"scheduling": {"routing": "round-robin"}})
    assert resolve_routing(chosen, wide, spreads_experts=True) == "round-robin"


def test_overlap_follows_the_hardware() -> None:
    assert [resolve_overlap(parse({}), device) for device in ("cpu", "cuda")] == [False, True]
    assert resolve_overlap(parse({"scheduling": {"overlap": True}}), "cpu")


def test_the_front_doors_bounds() -> None:
    section = {"max_open_requests": 5, "max_open_tokens": 600, "background_share": 0.5}
    limits = front_door_limits(parse({"scheduling": section}))
    assert {name: getattr(limits, name) for name in section} == section
