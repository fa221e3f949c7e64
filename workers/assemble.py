"""From settings to a rank that runs: read the configuration, check, load, size the cache."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workers.cache import CacheSize, KVCache, show_size, size_cache
from workers.graphs import CudaCapture
from workers.kernels.libraries import found
from workers.kernels.quantized import Weight, move
from workers.kernels.seam import Kernels
from workers.kernels.select import select_kernels
from workers.memory import free_bytes
from workers.model.build import build_decoder
from workers.model.config import ModelConfig, read_config
from workers.model.decoder import Decoder
from workers.model.layer_split import split_layers
from workers.model.other_config import NOTICE
from workers.model.sharding import Shard, check_plan, place_experts, shard_parameters
from workers.parallel.all_to_all import AllToAllDispatch
from workers.parallel.collectives import Collectives, CurrentCollectives
from workers.parallel.deep_ep import DeepEPDispatch, open_buffer, serves
from workers.parallel.dispatch import Dispatch, LocalDispatch, ShareDispatch
from workers.parallel.exchange import Exchange, ProcessGroupExchange
from workers.parallel.moves import RowMoves
from workers.parallel.plan import RankPlace
from workers.parallel.stages import OneStage, Stages
from workers.relocation import Relocation
from workers.runner import Model, Report, Runner
from workers.settings import EngineSettings
from workers.weights.disk import measure
from workers.weights.experts import ExpertReader
from workers.weights.form import Form
from workers.weights.index import TensorEntry, read_index
from workers.weights.layout import has_fused_experts, log_skipped_layers
from workers.weights.load import Progress, WeightReader

__all__ = ["assemble", "check_plan", "spreads_experts"]

log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def assemble(
    settings: EngineSettings,
    place: RankPlace,
    tensor: Collectives,
    *,
    stages: Stages | None = None,
    expert: Exchange | None = None,
    progress: Progress | None = None,
) -> Runner:
    """Builds the rank at `place`. All ranks of its DP group must call it together.

    `stages` joins it to the other stages, where there are any. `expert` joins the ranks of its stage over which the
    routed experts are spread; None where they are the tensor axis alone.

    `progress` hears of bytes read and bytes to read. Raises ValueError, before anything is loaded where that can be
    known, for settings that do not fit the model, the machine or the checkpoint.
    """
    started_s = time.monotonic()
    config = read_config(Path(settings.model_path))
    _check_settings(settings, config)
    if not config.native:
        return _adopt(settings, config, tensor, progress, started_s)
    stages = stages or OneStage()
    blueprint = _plan(settings, config, place)
    dispatch = _dispatch(blueprint.shard, settings, expert, blueprint.device, blueprint.kernels.moves)
    built = _build(blueprint, settings, tensor, stages, dispatch, progress)
    dtype, device = blueprint.dtype, blueprint.device
    cache = _cache(settings, built.decoder, built.weight_bytes, tensor, stages, dtype, device)
    report = Report(
        architecture=config.architecture,
        dtype=settings.dtype,
        device=str(device),
        kernels=blueprint.kernels.describe(settings.quantization),
        collectives=tensor.kind,
        dispatch="" if dispatch is None else dispatch.kind,
        weight_bytes=built.weight_bytes,
        cache_bytes=cache.num_blocks * cache.block_size * sum(built.decoder.cache_rows) * dtype.itemsize,
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        bytes_read=built.bytes_read,
        load_s=time.monotonic() - started_s,
    )
    experts = _relocation(blueprint, settings, built.decoder) if expert is not None else None
    runner = Runner(
        built.decoder, cache, model_config=config, report=report, experts=experts, dtype=dtype, device=device
    )
    if device.type == "cuda":
        _record(runner, settings, tensor, stages)
    return runner


def _record(runner: Runner, settings: EngineSettings, tensor: Collectives, stages: Stages) -> None:
    reason = runner.cannot_record()
    if stages.size > 1:
        reason = "a recorded step cannot wait for the stage before it"
    if reason is not None:
        runner.say_not_recorded(reason)
        return
    runner.record_decoding(
        CudaCapture(),
        max_batch_size=settings.max_batch_size,
        max_model_len=settings.max_model_len,
        meetings=lambda: tensor.meetings if isinstance(tensor, CurrentCollectives) else 1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blueprint:
    """What is known of a rank before anything is read."""

    folder: Path
    index: Mapping[str, TensorEntry]
    shard: Shard
    kernels: Kernels
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class _Built:
    decoder: Decoder
    weight_bytes: int
    bytes_read: int


def _plan(settings: EngineSettings, config: ModelConfig, place: RankPlace) -> _Blueprint:
    folder = Path(settings.model_path)
    dtype, device = _DTYPES[settings.dtype], torch.device(settings.device)
    index = read_index(folder)
    log_skipped_layers(config, index)
    return _Blueprint(
        folder=folder,
        index=index,
        shard=_shard(config, place, settings, has_fused_experts(index)),
        kernels=select_kernels(device, dtype, deterministic=settings.deterministic),
        dtype=dtype,
        device=device,
    )


def _build(
    blueprint: _Blueprint,
    settings: EngineSettings,
    tensor: Collectives,
    stages: Stages,
    dispatch: Dispatch[Any] | None,
    progress: Progress | None,
) -> _Built:
    """Reads the rank's weights into its layers."""
    shard, dtype, device = blueprint.shard, blueprint.dtype, blueprint.device
    with WeightReader(
        blueprint.folder,
        shard_parameters(shard),
        dtype,
        index=blueprint.index,
        quantization=shard.config.quantization,
        hold=settings.quantization,
        progress=progress,
    ) as reader:
        weight_bytes = _weight_bytes(reader, shard, blueprint.kernels, dtype)
        _check_weights_fit(settings, weight_bytes, device)

        def take(name: str) -> Weight | None:
            return move(reader.read(name), device) if name in reader else None

        reading_s = time.monotonic()
        with torch.inference_mode():
            decoder = build_decoder(
                shard,
                take,
                blueprint.kernels,
                tensor,
                stages=stages,
                dispatch=dispatch,
                num_positions=settings.max_model_len,
                dtype=dtype,
                device=device,
            )
        _log_speed(blueprint.index, reader.bytes_read, time.monotonic() - reading_s)
        return _Built(decoder=decoder, weight_bytes=weight_bytes, bytes_read=reader.bytes_read)


def _relocation(blueprint: _Blueprint, settings: EngineSettings, decoder: Decoder) -> Relocation:
    return Relocation(
        decoder.mixtures,
        ExpertReader(
            blueprint.shard,
            blueprint.folder,
            blueprint.index,
            blueprint.dtype,
            blueprint.device,
            hold=settings.quantization,
        ),
    )


def _adopt(
    settings: EngineSettings,
    config: ModelConfig,
    tensor: Collectives,
    progress: Progress | None,
    started_s: float,
) -> Runner:
    """A model that we have no code for, through transformers."""
    from workers.autotp.load import load_adopted  # imports transformers: seconds, for those who need it

    dtype, device, folder = _DTYPES[settings.dtype], torch.device(settings.device), Path(settings.model_path)
    entries = read_index(folder).values()
    total = sum(entry.size_bytes for entry in entries)
    whole = sum(math.prod(entry.shape) * dtype.itemsize for entry in entries)
    _check_weights_fit(settings, whole // tensor.size, device)  # at least: what is not cut is known later
    if progress is not None:
        progress(0, total)
    adopted = load_adopted(
        folder,
        config,
        tensor,
        max_model_len=settings.max_model_len,
        dtype=dtype,
        device=device,
        settle_s=(settings.step_timeout_s, settings.load_timeout_s),
    )
    if progress is not None:
        progress(total, total)
    cache = _cache(settings, adopted.model, adopted.weight_bytes, tensor, OneStage(), dtype, device)
    report = Report(
        architecture=config.architecture,
        dtype=settings.dtype,
        device=str(device),
        kernels=adopted.description,
        collectives=tensor.kind,
        dispatch="",
        weight_bytes=adopted.weight_bytes,
        cache_bytes=cache.num_blocks * cache.block_size * sum(adopted.model.cache_rows) * dtype.itemsize,
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        bytes_read=adopted.bytes_read,
        load_s=time.monotonic() - started_s,
    )
    return Runner(adopted.model, cache, model_config=config, report=report, dtype=dtype, device=device)


def _log_speed(index: Mapping[str, TensorEntry], bytes_read: int, seconds: float) -> None:
    """Beside the disk's own speed; reading, converting and packing are in ours."""
    path = max((entry.path for entry in index.values()), key=lambda path: path.stat().st_size)
    rate = bytes_read / max(seconds, 1e-9) / 1e9
    log.info(
        "loaded %.2f GB in %.2f s, %.2f GB/s; the disk alone gives %s", bytes_read / 1e9, seconds, rate, measure(path)
    )


def spreads_experts(settings: EngineSettings) -> bool:
    """Whether DP groups of this engine exchange tokens, because the model's routed experts are spread over them."""
    return settings.plan.data > 1 and read_config(Path(settings.model_path)).moe is not None


def _check_settings(settings: EngineSettings, config: ModelConfig) -> None:
    check_plan(config, settings.plan)
    if settings.dtype not in _DTYPES:
        raise ValueError(f"inference.dtype must be one of {', '.join(_DTYPES)}, not {settings.dtype!r}")
    if settings.quantization not in tuple(Form):
        raise ValueError(f"inference.quantization must be one of {', '.join(Form)}, not {settings.quantization!r}")
    if settings.quantization == Form.FP8 and config.quantization is None:
        raise ValueError("inference.quantization fp8 needs a checkpoint in FP8; `shoal convert` makes one")
    if not config.native:
        _check_adopted(settings, config)
    if settings.deterministic and settings.plan.tensor > 2:
        raise ValueError(
            f"inference.deterministic takes parallel.tensor 1 or 2, not {settings.plan.tensor}: a sum over more ranks "
            "is made in an order that depends on how much is summed"
        )
    if settings.max_model_len > config.max_position_embeddings:
        raise ValueError(
            f"inference.max_model_len {settings.max_model_len} exceeds the model's {config.max_position_embeddings} "
            "positions"
        )


def _check_adopted(settings: EngineSettings, config: ModelConfig) -> None:
    if settings.quantization != Form.DENSE:
        raise ValueError(
            f"inference.quantization must be none for a {config.model_type} model, which {NOTICE}; not "
            f"{settings.quantization}"
        )
    if settings.deterministic:
        raise ValueError(f"inference.deterministic must be false for a {config.model_type} model, which {NOTICE}")


def _shard(config: ModelConfig, place: RankPlace, settings: EngineSettings, fused_experts: bool) -> Shard:
    """The rank's part of the model."""
    plan = settings.plan
    held: tuple[int, ...] = ()
    if config.moe is not None:
        held = place_experts(config.moe.gate.num_experts, plan).slots[place.expert_index]
    layers = split_layers(config, plan.pipeline)[place.stage]
    return Shard(config, place.tensor_index, plan.tensor, held, fused_experts, layers)


def _dispatch(
    shard: Shard, settings: EngineSettings, expert: Exchange | None, device: torch.device, moves: RowMoves
) -> Dispatch[Any] | None:
    """How tokens reach their experts; None for a model without."""
    if shard.config.moe is None:
        return None
    num_experts = shard.config.moe.gate.num_experts
    if expert is not None:
        placement = place_experts(num_experts, settings.plan)
        if _can_use_deep_ep(settings, expert):
            assert isinstance(expert, ProcessGroupExchange)
            buffer = open_buffer(expert.group, expert.size, shard.config.hidden_size * 2)
            return DeepEPDispatch(buffer, expert, placement, part=(shard.index, shard.size), device=device)
        return AllToAllDispatch(expert, placement, part=(shard.index, shard.size), device=device, moves=moves)
    if shard.size == 1:
        return LocalDispatch(num_experts, moves)
    return ShareDispatch(num_experts, shard.experts, device, moves)


def _can_use_deep_ep(settings: EngineSettings, expert: Exchange) -> bool:
    """It moves bf16 rows between GPUs; its sums depend on where experts live."""
    fits = settings.device == "cuda" and settings.dtype == "bfloat16" and not settings.deterministic
    return fits and isinstance(expert, ProcessGroupExchange) and "DeepEP" in found() and serves(expert.size)


def _weight_bytes(reader: WeightReader, shard: Shard, kernels: Kernels, dtype: torch.dtype) -> int:
    """What the rank's parameters take once built."""
    size_bytes = reader.held_bytes
    if kernels.packs_weights and shard.is_last:
        # the head is kept in both layouts: rows are looked up in one of them
        size_bytes += shard.vocab_rows * shard.config.hidden_size * dtype.itemsize
    return size_bytes


def _check_weights_fit(settings: EngineSettings, weight_bytes: int, device: torch.device) -> None:
    limit_bytes, name = free_bytes(device), "free memory"
    if settings.memory_limit_bytes is not None and settings.memory_limit_bytes < limit_bytes:
        limit_bytes, name = settings.memory_limit_bytes, "the rank's part of resources.memory_limit"
    if weight_bytes > limit_bytes:
        raise ValueError(
            f"the model's weights need {show_size(weight_bytes)} per rank and may take {show_size(limit_bytes)} "
            f"({name}); raise that, or parallel.tensor, or choose a smaller inference.dtype"
        )


def _cache(
    settings: EngineSettings,
    model: Model,
    weight_bytes: int,
    tensor: Collectives,
    stages: Stages,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """With as many blocks as the poorest rank of the DP group can hold: all have the same ones."""
    limit_bytes, limit_name = _cache_limit(settings, weight_bytes, device)
    num_blocks = size_cache(
        CacheSize(
            bytes_per_token=sum(model.cache_rows) * dtype.itemsize,
            block_size=settings.block_size,
            max_model_len=settings.max_model_len,
            max_batch_size=settings.max_batch_size,
            limit_bytes=limit_bytes,
            limit_name=limit_name,
        )
    )
    agreed = stages.minimum(tensor.minimum(num_blocks))
    return KVCache(model.cache_rows, agreed, settings.block_size, dtype=dtype, device=device)


def _cache_limit(settings: EngineSettings, weight_bytes: int, device: torch.device) -> tuple[int, str]:
    """What the cache of this rank may take, and the setting that says so."""
    if settings.cache_bytes is not None:
        return settings.cache_bytes, "resources.cache_size"
    measured = int(free_bytes(device) * settings.memory_fraction)
    if settings.memory_limit_bytes is None or settings.memory_limit_bytes - weight_bytes >= measured:
        return measured, "the rank's part of free memory"
    return settings.memory_limit_bytes - weight_bytes, "what resources.memory_limit leaves beside the weights"
