"""`shoal plan`: what `parallel: auto` would choose on a cluster that is here, or that one thinks of renting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.app.ray_session import visiting_ray
from cluster.cli.failure import FAILURE, USAGE, fail
from cluster.config import Config, ConfigError, load
from cluster.config.environment import cache_folder
from cluster.config.machine import Machine, Node, this_machine
from cluster.config.planning import Resolved, resolve_engine
from cluster.config.schema import ParallelSection
from cluster.config.sizes import parse_size, show_size
from cluster.models import catalog
from cluster.models.errors import ModelError
from cluster.models.folder import ModelFacts, survey

__all__ = ["imagined", "show"]


def show(
    config_path: Path | None, options: Mapping[tuple[str, ...], object], machine: Machine | None, *, as_json: bool
) -> None:
    """`machine` is an imagined one; None: the cluster at cluster.address, or this machine. A plan that the
    configuration gives is only held against the limits. Ends by SystemExit where no plan works."""
    try:
        config = load(config_path, options)
        if config.parallel == ParallelSection():
            config = replace(config, parallel="auto")
        models_dir = Path(config.model.models_dir).expanduser() if config.model.models_dir else cache_folder()
        model = survey(catalog.described(config.model.path, models_dir))
        machine = machine or _found(config)
        resolved = resolve_engine(config, model, machine)
    except ConfigError as error:
        fail(error, USAGE)
    except (ModelError, ConnectionError, ValueError) as error:
        fail(error, FAILURE)
    if as_json:
        print(json.dumps(_document(config, resolved), indent=2))
    else:
        _print(config, model, machine, resolved)


def imagined(nodes: int, gpus: int, gpu_memory: str | None, cores: int | None, memory: str | None) -> Machine:
    """Nodes alike; what is not said of them is as here. Raises ValueError."""
    if gpus and gpu_memory is None:
        raise ValueError("--gpu-memory: say what each GPU has, such as 80GB")
    here = this_machine()
    size = here.memory_bytes if memory is None else parse_size(memory, "--memory")
    node = Node(
        cores=cores or here.cores,
        memory_bytes=size,
        free_bytes=size,
        gpus=gpus,
        gpu_memory_bytes=None if gpu_memory is None else parse_size(gpu_memory, "--gpu-memory"),
    )
    return Machine(
        cores=node.cores,
        memory_bytes=size,
        free_bytes=size,
        gpus=nodes * gpus,
        fast_bfloat16=here.fast_bfloat16,
        gpu_memory_bytes=node.gpu_memory_bytes,
        nodes=(node,) * nodes,
    )


def _found(config: Config) -> Machine:
    if config.cluster.address is None:
        return this_machine()
    from cluster.app.nodes import cluster_machine  # brings Ray

    with visiting_ray(config.cluster.address):
        return cluster_machine()


def _document(config: Config, resolved: Resolved) -> dict[str, object]:
    return {
        "device": resolved.device,
        "dtype": resolved.dtype,
        "quantization": config.inference.quantization,
        "max_model_len": resolved.max_model_len,
        "parallel": asdict(resolved.plan),
        "reasons": list(resolved.reasons),
        "rank_memory": None
        if resolved.memory is None
        else {**asdict(resolved.memory), "left_bytes": resolved.memory.left_bytes},
    }


def _print(config: Config, model: ModelFacts, machine: Machine, resolved: Resolved) -> None:
    console = Console(highlight=False, soft_wrap=True)
    quantization = config.inference.quantization
    form = resolved.dtype if quantization == "none" else f"{resolved.dtype}, weights in {quantization}"
    console.print(f"{escape(model.config.architecture)}, in {form}, on {_cluster(machine, resolved.device)}")
    axes = ", ".join(f"{axis}: {value}" for axis, value in asdict(resolved.plan).items())
    console.print(f"[bold]parallel: {{{axes}}}[/bold]")
    for reason in resolved.reasons:
        console.print(f"  {escape(reason)}")
    if not resolved.reasons:
        _print_given(console, resolved)


def _print_given(console: Console, resolved: Resolved) -> None:
    """Of a plan that the file gives there is no more to say than what its ranks hold."""
    memory = resolved.memory
    if memory is None:
        console.print("  the memory of the GPUs is not known: whether the plan fits was not looked at")
        return
    table = Table("a rank has", "weights", "runtime, steps", "cache", "tokens", "left", box=None)
    held = (memory.memory_bytes, memory.weight_bytes, memory.reserve_bytes, memory.cache_bytes)
    sizes = [show_size(size) for size in held]
    table.add_row(*sizes, f"{memory.cache_tokens:,}", show_size(memory.left_bytes))
    console.print(table)


def _cluster(machine: Machine, device: str) -> str:
    nodes = machine.all_nodes
    text = "this machine" if not machine.nodes else f"{len(nodes)} node{'s' * (len(nodes) > 1)}"
    if device == "cuda":
        return f"{text} with {machine.gpus} GPUs in all"
    return f"{text} with {machine.cores} cores and {show_size(machine.memory_bytes)}" + " each" * (len(nodes) > 1)
