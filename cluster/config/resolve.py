"""From what the file says, the model is and the machine has to what every rank is told. Nothing stays "auto"."""

from __future__ import annotations

import ipaddress
from dataclasses import asdict
from pathlib import Path

from cluster.config.load import ConfigError
from cluster.config.machine import Machine
from cluster.config.scheduling import resolve_overlap, scheduling_settings
from cluster.config.schema import Config, ParallelSection
from cluster.config.sizes import parse_share_or_size, parse_size, show_size
from cluster.models.folder import ModelFacts
from scheduler.autoscale import AutoscaleSettings
from workers.model.other_config import require_transformers
from workers.model.sharding import check_plan, tensor_sizes
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings, ExpertBalance

__all__ = ["autoscale_settings", "check_exposure", "engine_settings", "resolve_device", "resolve_dtype", "resolve_plan"]

# Of the memory that is free after loading: what the caches of all engines on one machine take together, and what
# the cache of a GPU's one rank takes.
_CACHE_SHARE = 0.5
_GPU_CACHE_SHARE = 0.9
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def engine_settings(config: Config, model: ModelFacts, machine: Machine, *, name: str, folder: Path) -> EngineSettings:
    """The same for every engine but for its name, which its leader fills in. Raises ConfigError."""
    try:
        return _engine_settings(config, model, machine, name, folder)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _engine_settings(config: Config, model: ModelFacts, machine: Machine, name: str, folder: Path) -> EngineSettings:
    inference, resources = config.inference, config.resources
    if not model.config.native:
        require_transformers(model.config.model_type)
    device = resolve_device(config, machine)
    plan = resolve_plan(config, model, machine, device)
    dtype = resolve_dtype(inference.dtype, model, machine, device)
    ranks_here = plan.num_ranks * config.cluster.engines
    max_model_len = _max_model_len(config, model)
    memory_limit = parse_share_or_size(resources.memory_limit, machine.memory_bytes, "resources.memory_limit")
    if device == "cpu" and inference.quantization == "none":  # what quantized weights take, the ranks find out
        _check_weights_fit(model, dtype, plan, config.cluster.engines, min(memory_limit, machine.free_bytes))
    balance = inference.expert_balance
    if balance is not None and (plan.data == 1 or model.config.moe is None):
        raise ValueError(
            "inference.expert_balance: experts move between DP groups only; set parallel.data, or leave it"
        )
    if plan.pipeline > 1 and (balance is not None or inference.record_routing is not None):
        key = "expert_balance" if balance is not None else "record_routing"
        raise ValueError(f"inference.{key}: works with parallel.pipeline 1 only, not {plan.pipeline}")
    if inference.record_routing is not None and model.config.moe is None:
        raise ValueError(f"inference.record_routing: a {model.config.model_type} model has no routed experts")
    auto_cache = resources.cache_size == "auto"
    return EngineSettings(
        engine="",
        model_name=name,
        model_path=str(folder),
        plan=plan,
        dtype=dtype,
        device=device,
        quantization=inference.quantization,
        num_threads=_num_threads(config, machine, ranks_here),
        max_model_len=max_model_len,
        max_batch_size=inference.max_batch_size,
        max_batch_tokens=inference.max_batch_tokens,
        block_size=inference.block_size,
        cache_bytes=None if auto_cache else parse_size(resources.cache_size, "resources.cache_size"),
        memory_fraction=_CACHE_SHARE / config.cluster.engines if device == "cpu" else _GPU_CACHE_SHARE,
        memory_limit_bytes=memory_limit // ranks_here if device == "cpu" else None,
        deterministic=inference.deterministic,
        step_timeout_s=inference.step_timeout_s,
        load_timeout_s=inference.load_timeout_s,
        resume_window_s=config.cluster.resume_window_s,
        collectives=inference.collectives,
        expert_balance=None if balance is None else ExpertBalance(**asdict(balance)),
        record_routing=inference.record_routing,
        scheduling=scheduling_settings(config),
        overlap=resolve_overlap(config, device),
        record_steps=config.scheduling.record_steps,
    )


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


def resolve_device(config: Config, machine: Machine) -> str:
    """ "cuda" where there are GPUs and the configuration lets them be used. Raises ValueError."""
    gpus = machine.gpus if config.resources.gpus == "auto" else config.resources.gpus
    wanted = config.inference.device_map
    if gpus > machine.gpus:
        raise ValueError(f"resources.gpus: {gpus} asked for, {machine.gpus} found")
    if wanted == "cuda" and gpus == 0:
        raise ValueError("inference.device_map: cuda asked for, but no GPU was found")
    return "cuda" if wanted != "cpu" and gpus > 0 else "cpu"


def resolve_plan(config: Config, model: ModelFacts, machine: Machine, device: str) -> ParallelPlan:
    """Raises ValueError for a plan that the model or the machine cannot follow."""
    section = config.parallel
    if section == "auto":
        section = ParallelSection(tensor=_auto_tensor(config, model, machine, device))
    plan = ParallelPlan(
        data=section.data,
        pipeline=section.pipeline,
        tensor=section.tensor,
        redundant_experts=section.redundant_experts,
    )
    check_plan(model.config, plan)
    if device == "cuda" and plan.num_ranks * config.cluster.engines > machine.gpus:
        raise ValueError(f"parallel: {plan} needs {plan.num_ranks} GPUs an engine, {machine.gpus} were found in all")
    return plan


def resolve_dtype(wanted: str, model: ModelFacts, machine: Machine, device: str) -> str:
    """The checkpoint's dtype where the hardware computes in it, float32 where it does not."""
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return model.config.dtype if model.config.dtype in _DTYPE_BYTES else "bfloat16"
    return "bfloat16" if machine.fast_bfloat16 and model.config.dtype != "float32" else "float32"


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


def _auto_tensor(config: Config, model: ModelFacts, machine: Machine, device: str) -> int:
    """The GPUs of one engine, as far as the heads divide; on CPUs one rank uses all cores as threads."""
    if device == "cpu":
        return 1
    gpus = machine.gpus if config.resources.gpus == "auto" else config.resources.gpus
    return max(
        size for size in range(1, max(1, gpus // config.cluster.engines) + 1) if size in tensor_sizes(model.config)
    )


def _max_model_len(config: Config, model: ModelFacts) -> int:
    wanted = config.inference.max_model_len
    if wanted == "auto":
        return model.config.max_position_embeddings
    if wanted > model.config.max_position_embeddings:
        raise ValueError(
            f"inference.max_model_len: {wanted} is beyond the model's {model.config.max_position_embeddings} positions"
        )
    return wanted


def _num_threads(config: Config, machine: Machine, ranks_here: int) -> int:
    threads = config.resources.cpu_threads
    return max(1, machine.cores // ranks_here) if threads == "auto" else threads


def _check_weights_fit(model: ModelFacts, dtype: str, plan: ParallelPlan, engines: int, limit_bytes: int) -> None:
    scale = _DTYPE_BYTES[dtype] / _DTYPE_BYTES.get(model.config.dtype, 2)
    # The DP groups of an engine share one set of routed experts; what each holds beside them the ranks find out.
    copies = engines if model.config.moe is not None else plan.data * engines
    if not model.config.native:
        copies *= plan.tensor  # each rank reads the whole model before it keeps its part
    needed = int(model.weight_bytes * scale * copies)
    if needed > limit_bytes:
        fitting = limit_bytes // int(model.weight_bytes * scale)
        hint = (
            f"cluster.engines x parallel.data of {fitting} would fit"
            if fitting
            else "a smaller model, inference.dtype: bfloat16 or a machine with more memory would fit"
            if dtype == "float32"
            else "a smaller model or a machine with more memory would fit"
        )
        raise ValueError(
            f"not enough memory: {copies} copies of the weights in {dtype} need {show_size(needed)}, "
            f"resources.memory_limit and what is free leave {show_size(limit_bytes)}; {hint}"
        )
