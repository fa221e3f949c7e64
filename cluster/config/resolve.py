"""From what the file says, the model is and the machine has to what every rank is told. Nothing stays "auto"."""

from __future__ import annotations

import ipaddress
from dataclasses import asdict
from pathlib import Path

from cluster.config.cluster_shape import CACHE_SHARE, GPU_CACHE_SHARE, ranks_on_a_node
from cluster.config.load import ConfigError
from cluster.config.machine import Machine
from cluster.config.planning import resolve_engine
from cluster.config.scheduling import resolve_overlap, scheduling_settings
from cluster.config.schema import Config
from cluster.config.sizes import parse_share_or_size
from cluster.config.wishes import cache_bytes
from cluster.models.folder import ModelFacts
from scheduler.autoscale import AutoscaleSettings
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings, ExpertBalance

__all__ = ["autoscale_settings", "check_exposure", "engine_settings"]


def engine_settings(config: Config, model: ModelFacts, machine: Machine, *, name: str, folder: Path) -> EngineSettings:
    """The same for every engine but for its name, which its leader fills in. Raises ConfigError."""
    try:
        return _engine_settings(config, model, machine, name, folder)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _engine_settings(config: Config, model: ModelFacts, machine: Machine, name: str, folder: Path) -> EngineSettings:
    inference, resources = config.inference, config.resources
    resolved = resolve_engine(config, model, machine)
    device, plan = resolved.device, resolved.plan
    ranks_here = ranks_on_a_node(config, machine, plan.num_ranks)
    memory_limit = parse_share_or_size(resources.memory_limit, machine.memory_bytes, "resources.memory_limit")
    _check_experts(config, model, plan)
    balance = inference.expert_balance
    return EngineSettings(
        engine="",
        model_name=name,
        model_path=str(folder),
        plan=plan,
        plan_reasons=resolved.reasons,
        dtype=resolved.dtype,
        device=device,
        quantization=inference.quantization,
        num_threads=_num_threads(config, machine, ranks_here),
        max_model_len=resolved.max_model_len,
        max_batch_size=inference.max_batch_size,
        max_batch_tokens=inference.max_batch_tokens,
        block_size=inference.block_size,
        cache_bytes=cache_bytes(config),
        memory_fraction=CACHE_SHARE / ranks_here if device == "cpu" else GPU_CACHE_SHARE,
        memory_limit_bytes=memory_limit // ranks_here if device == "cpu" else None,
        deterministic=inference.deterministic,
        step_timeout_s=inference.step_timeout_s,
        load_timeout_s=inference.load_timeout_s,
        resume_window_s=config.cluster.resume_window_s,
        collectives=inference.collectives,
        expert_balance=None if balance is None else ExpertBalance(**asdict(balance)),
        record_routing=_folder(inference.record_routing),
        scheduling=scheduling_settings(config),
        overlap=resolve_overlap(config, device),
        record_steps=_folder(config.scheduling.record_steps),
    )


def _folder(path: str | None) -> str | None:
    """Ranks run in folders of their own: what is relative is so to where the command was given."""
    return None if path is None else str(Path(path).expanduser().absolute())


def _check_experts(config: Config, model: ModelFacts, plan: ParallelPlan) -> None:
    """What is asked of routed experts must be possible with the plan. Raises ValueError."""
    balance, recording = config.inference.expert_balance, config.inference.record_routing
    if balance is not None and (plan.data == 1 or model.config.moe is None):
        raise ValueError(
            "inference.expert_balance: experts move between DP groups only; set parallel.data, or leave it"
        )
    if recording is not None and model.config.moe is None:
        raise ValueError(f"inference.record_routing: a {model.config.model_type} model has no routed experts")


def autoscale_settings(config: Config) -> AutoscaleSettings | None:
    """None where engines stay as many as they are. Raises ConfigError."""
    section, cluster = config.cluster.autoscale, config.cluster
    if section is None:
        return None
    if section.least > section.most:
        raise ConfigError(f"cluster.autoscale.least: {section.least} is above most, {section.most}")
    if section.cache_low >= section.cache_high:
        raise ConfigError(f"cluster.autoscale.cache_low: must be below cache_high, {section.cache_high:g}")
    if cluster.address is None and cluster.max_engines != "auto" and cluster.max_engines < section.most:
        raise ConfigError(f"cluster.max_engines: autoscale.most wants room for {section.most}")
    return AutoscaleSettings(**asdict(section))


def check_exposure(config: Config) -> None:
    """Raises ConfigError where strangers could use the server without a key."""
    host = config.cluster.host
    if config.security.api_key or config.security.api_keys or config.security.insecure or _is_loopback(host):
        return
    raise ConfigError(
        f"cluster.host: {host} can be reached from other machines; set security.api_key, "
        "or state security.insecure: true"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _num_threads(config: Config, machine: Machine, ranks_here: int) -> int:
    threads = config.resources.cpu_threads
    return max(1, machine.cores // ranks_here) if threads == "auto" else threads
