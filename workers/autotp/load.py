"""Loads a model of transformers, cuts it, gives it our cache, and proves the result.

The proof: before it is cut the model computes two short sequences with transformers' own attention; afterwards it
computes them through the paged cache, mixed in one batch and in chunks. What differs is not served. That finds what
neither this code nor AutoTP can know of every architecture there is, at the price of a few short passes.

A model that will be cut is read in its checkpoint's own dtype, which transformers does by mapping the files: nothing is
held until it is touched, and what is touched the system may take back. AutoTP copies this rank's part out of the maps,
and what it left whole is copied after that, a tensor at a time. Only the first rank touches everything, for the proof.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from workers.autotp.attention import NAME, AttentionLayer, paged_attention
from workers.autotp.cut import SumFailed, cut
from workers.autotp.model import AdoptedModel
from workers.autotp.proof import Probe, prove
from workers.model.config import ModelConfig
from workers.model.other_config import NOTICE, require_transformers
from workers.parallel.collectives import Collectives
from workers.weights.index import TensorEntry, read_index

__all__ = ["Adopted", "load_adopted"]

log = logging.getLogger(__name__)

_COMPUTED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Adopted:
    """`weight_bytes` are this rank's; `description` says what computes, for `shoal status`. `bytes_read` counts this
    rank's part in the checkpoint's dtype, and at the first rank the whole checkpoint."""

    model: AdoptedModel
    weight_bytes: int
    bytes_read: int
    description: str


def load_adopted(
    folder: Path,
    config: ModelConfig,
    tensor: Collectives,
    *,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    settle_s: tuple[float, float] = (3.0, 1800.0),
) -> Adopted:
    """All ranks of the engine must call it together. Each holds its part and, at times, one tensor more.

    `settle_s` are the timeouts of a step and of loading.
    Raises ValueError for a model that transformers does not know, AutoTP cannot cut or our cache cannot hold.
    """
    require_transformers(config.model_type)
    theirs = _their_config(folder, config)
    _check(theirs, config.model_type, max_model_len)
    log.warning("a %s model %s", config.model_type, NOTICE)
    entries = read_index(folder).values()
    bytes_read = sum(entry.size_bytes for entry in entries)
    stored = dtype if tensor.size == 1 else _stored_dtype(entries, dtype)
    model = _read(folder, theirs, stored)
    if tensor.size == 1:
        model.to(device)  # otherwise only this rank's part goes there, once it is cut
    with torch.no_grad():
        probes = _probes(model, config.vocab_size, max_model_len, tensor)
        model.set_attn_implementation(NAME)
        try:
            if tensor.size > 1:
                part_bytes = _cut(model, tensor, stored, dtype, settle_s)
                bytes_read = bytes_read if tensor.index == 0 else part_bytes
            adopted = AdoptedModel(model, first=tensor.index == 0, num_layers=config.num_layers, device=device)
            _check_windows(theirs, adopted.layers, max_model_len)
            prove(adopted, probes, dtype=dtype, device=device)
        except SumFailed:
            raise
        except (ValueError, RuntimeError) as error:
            raise ValueError(_refusal(config.model_type, tensor.size, error)) from error
    parameters = {id(parameter): parameter.nbytes for parameter in (*model.parameters(), *model.buffers())}
    how = "" if tensor.size == 1 else f" cut by DeepSpeed AutoTP {version('deepspeed')}"
    description = f"transformers {version('transformers')} ({type(model).__name__}){how}, torch's attention"
    return Adopted(adopted, sum(parameters.values()), bytes_read, description)


def _cut(
    model: Any, tensor: Collectives, stored: torch.dtype, dtype: torch.dtype, settle_s: tuple[float, float]
) -> int:
    """Leaves this rank's part in memory of its own, in `dtype`; its bytes in the checkpoint's."""
    mapped = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # DeepSpeed rounds these with the weights; angles are wanted as they are.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    cut(model, tensor, stored, settle_s)
    part_bytes: int = sum(parameter.nbytes for parameter in model.parameters())
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
        if parameter.untyped_storage().data_ptr() in mapped:
            parameter.data = parameter.data.clone()
    for name, buffer in model.named_buffers():
        if name in buffers and buffer.shape == buffers[name].shape:
            buffer.data = buffers[name].to(buffer.device)
    tensor.minimum(0)  # the first pass is under a step's timeout, and some read longer than others
    return part_bytes


def _stored_dtype(entries: Iterable[TensorEntry], dtype: torch.dtype) -> torch.dtype:
    """What most of the checkpoint is kept in, where transformers computes in that."""
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
    return _COMPUTED.get(max(sizes, key=lambda name: sizes[name]), dtype)


def _their_config(folder: Path, config: ModelConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"config.json: transformers {version('transformers')} knows no model_type {config.model_type!r}, and code "
            "that comes with a model is never run"
        )
    theirs = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(theirs) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"config.json: model_type {config.model_type!r} is no causal language model in transformers")
    return theirs


def _check(theirs: Any, model_type: str, max_model_len: int) -> None:
    """What can be told to be wrong before anything is read."""
    for rope in _ropes(theirs):
        longest = rope.get("original_max_position_embeddings") or max_model_len
        if rope.get("rope_type") == "longrope" and max_model_len > longest:
            raise ValueError(
                f"inference.max_model_len {max_model_len}: beyond {longest} tokens the rotary angles of a {model_type} "
                f"model (longrope) depend on the longest sequence of a step; {longest} or less works"
            )


def _ropes(theirs: Any) -> Iterator[dict[str, Any]]:
    """The rotary embeddings: one, or one for each type of layer."""
    found = getattr(theirs, "rope_parameters", None) or {}
    yield from (rope for rope in (found, *found.values()) if isinstance(rope, dict))


def _check_windows(theirs: Any, layers: Sequence[AttentionLayer], max_model_len: int) -> None:
    """Whether the layers' own windows are those that their configuration speaks of, as far as sequences can reach."""
    window, types = getattr(theirs, "sliding_window", None), getattr(theirs, "layer_types", None)
    if window is None or window >= max_model_len:
        return
    for number, layer in enumerate(layers):
        slides = types[number] == "sliding_attention" if types else True
        if layer.window != (window if slides else None):
            raise ValueError(
                f"layer {number} does not tell its attention of its window of {window} tokens; "
                f"inference.max_model_len {window} or less works"
            )


def _read(folder: Path, theirs: Any, dtype: torch.dtype) -> Any:
    """The whole model in main memory, with transformers' own plain attention."""
    import transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs._experts_implementation = "eager"  # the others want a GPU, or widths that are multiples of 16 bytes
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=theirs,
        dtype=dtype,
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    # transformers makes up what a checkpoint lacks
    missing = sorted(info["missing_keys"]) + sorted(str(found[0]) for found in info["mismatched_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}, or has it in another shape ({len(missing)} in all)")
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"a {theirs.model_type} model does not attend through transformers' attention interface, so it cannot use "
            "our cache"
        )
    return model.eval().requires_grad_(False)


def _probes(model: Any, vocab_size: int, max_model_len: int, tensor: Collectives) -> list[Probe]:
    """Two sequences, longer than a small window, and at the first rank, for which all wait, every token's logits."""
    reached = 0
    try:
        found = _answer(model, vocab_size, max_model_len, answered=tensor.index == 0)
        reached = 1
    finally:
        agreed = tensor.minimum(reached)
    if not agreed:
        raise ValueError(f"another rank could not run this {model.config.model_type} model before it was cut")
    return found


def _answer(model: Any, vocab_size: int, max_model_len: int, *, answered: bool) -> list[Probe]:
    window = getattr(model.config, "sliding_window", None) or 0
    length = min(max_model_len, 16 + (window if window <= 64 else 0))
    probes = []
    for count, stride in ((length, 7919), (max(2, length - 5), 104729)):
        token_ids = [(stride * (n + 1)) % vocab_size for n in range(count)]
        logits = torch.empty(0)
        if answered:
            logits = model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]
        probes.append(Probe(tuple(token_ids), logits.float()))
    return probes


def _refusal(model_type: str, size: int, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    if size == 1:
        return f"this {model_type} model cannot be served through transformers: {reason}"
    return f"parallel.tensor {size}: DeepSpeed AutoTP does not cut this {model_type} model right: {reason}; 1 may work"
