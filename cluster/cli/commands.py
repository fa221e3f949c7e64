"""The commands and their options; what they do is in the modules beside."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.chat import chat
from cluster.cli.connection import CaOption, CertOption, PrivateKeyOption, Tls, TlsOption
from cluster.cli.operate import chaos, drain, rollout, scale

__all__ = ["app"]

app = typer.Typer(
    help="Serve language models from one machine or many.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Models by name.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.command()(chat)
for operation in (drain, scale, rollout, chaos):
    app.command()(operation)


class LogLevel(StrEnum):
    """Of our own logs."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


ConfigOption = Annotated[Path | None, typer.Option("--config", help="A YAML file; options go before it.")]
ModelsDirOption = Annotated[
    Path | None, typer.Option(help="Where pulled models are kept (or SHOAL_MODELS_DIR).", show_default=False)
]
DoorOption = Annotated[str, typer.Option(help="A front door's gRPC address.")]
KeyOption = Annotated[
    str | None, typer.Option(envvar="SHOAL_API_KEY", help="Sent as a bearer token.", show_default=False)
]


@app.command()
def serve(
    model_path: Annotated[
        str | None,
        typer.Option(help="A folder, a Hugging Face name, or a short name of `shoal models list`.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    port: Annotated[int | None, typer.Option(help="gRPC; 0 takes a free one. [9000]", show_default=False)] = None,
    http_port: Annotated[int | None, typer.Option(help="HTTP; 0 takes a free one. [8000]", show_default=False)] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen. [127.0.0.1]", show_default=False)] = None,
    log_level: Annotated[LogLevel | None, typer.Option(show_default=False)] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; else a local Ray is started.", show_default=False)
    ] = None,
    models_dir: ModelsDirOption = None,
    tensor: Annotated[int | None, typer.Option(help="Ranks that share each layer.", show_default=False)] = None,
    data: Annotated[int | None, typer.Option(help="DP groups of an engine.", show_default=False)] = None,
    engines: Annotated[int | None, typer.Option(help="Copies of the model.", show_default=False)] = None,
    front_doors: Annotated[int | None, typer.Option(help="Front doors.", show_default=False)] = None,
) -> None:
    """Serve a model over gRPC and HTTP until Ctrl-C."""
    from cluster.cli.serve import serve as run

    options: dict[tuple[str, ...], object] = {
        ("model", "path"): model_path,
        ("model", "models_dir"): None if models_dir is None else str(models_dir),
        ("cluster", "port"): port,
        ("cluster", "http_port"): http_port,
        ("cluster", "host"): host,
        ("cluster", "address"): address,
        ("cluster", "engines"): engines,
        ("cluster", "front_doors"): front_doors,
        ("parallel", "tensor"): tensor,
        ("parallel", "data"): data,
        ("telemetry", "log_level"): None if log_level is None else log_level.value,
    }
    run(config, {key: value for key, value in options.items() if value is not None})


@models_app.command("list")
def models_list(models_dir: ModelsDirOption = None) -> None:
    """Show the short names, and which models are on this machine."""
    from cluster.cli.models import show

    show(models_dir)


@models_app.command("pull")
def models_pull(name: str, models_dir: ModelsDirOption = None) -> None:
    """Fetch a model by its short name or its Hugging Face name; check it if it is here."""
    from cluster.cli.models import pull

    pull(name, models_dir)


@app.command()
def status(
    address: DoorOption = "127.0.0.1:9000",
    api_key: KeyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    tls: TlsOption = False,
    tls_ca: CaOption = None,
    tls_cert: CertOption = None,
    tls_key: PrivateKeyOption = None,
) -> None:
    """Show engines, ranks and front doors of a running cluster."""
    from cluster.cli.status import show

    secured = Tls(enabled=tls, ca=tls_ca, cert=tls_cert, key=tls_key)
    show(address, api_key, as_json=as_json, tls=secured)


@app.command()
def doctor(
    config: ConfigOption = None,
    model_path: Annotated[
        str | None, typer.Option(help="A model that every node must have, whole.", show_default=False)
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, every node of it; else this machine.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    links: Annotated[bool, typer.Option(help="Measure between every two nodes.")] = True,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that a node or a link may take.")] = 30.0,
) -> None:
    """Look for what would keep a cluster from starting, and say how to mend it.

    Exits with 0 where nothing is wrong, 1 where something is, 2 where it could not look.
    """
    from cluster.cli.doctor import doctor as run

    options: dict[tuple[str, ...], object] = {("model", "path"): model_path, ("cluster", "address"): address}
    given = {key: value for key, value in options.items() if value is not None}
    run(config, given, as_script=as_json, with_links=links, timeout_s=timeout)


@app.command()
def plan(
    model_path: Annotated[
        str | None, typer.Option(help="A folder (config.json is enough), or a name.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Think of so many nodes.", show_default=False)] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="With so many GPUs each.")] = 0,
    gpu_memory: Annotated[str | None, typer.Option(help="Of each, such as 80GB.", show_default=False)] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Of each node. [as here]", show_default=False)] = None,
    memory: Annotated[str | None, typer.Option(help="Of each node. [as here]", show_default=False)] = None,
    quantization: Annotated[str | None, typer.Option(help="none, fp8 or int8.", show_default=False)] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, show_default=False)] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Say which plan `parallel: auto` would choose, and why: here, at --address, or on a cluster to be rented."""
    from cluster.cli.plan import imagined, show

    options: dict[tuple[str, ...], object] = {
        ("model", "path"): model_path,
        ("inference", "quantization"): quantization,
        ("inference", "max_model_len"): max_model_len,
        ("cluster", "address"): address,
    }
    try:
        thought_of = nodes or gpus_per_node or cores or memory
        machine = imagined(nodes or 1, gpus_per_node, gpu_memory, cores, memory) if thought_of else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    show(config, {key: value for key, value in options.items() if value is not None}, machine, as_json=as_json)


@app.command("convert")
def convert_checkpoint(
    source: Annotated[Path | None, typer.Argument(help="A model folder.", show_default=False)] = None,
    target: Annotated[Path | None, typer.Argument(help="Where to write; empty or new.", show_default=False)] = None,
    quantization: Annotated[str, typer.Option(help="none, fp8 or int8, of the projections.")] = "none",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32, of the rest.")] = "bfloat16",
    max_shard_size: Annotated[str, typer.Option(help="Of each file.")] = "4GB",
    verify: Annotated[
        Path | None, typer.Option(help="Only check a converted folder against its checksums.", show_default=False)
    ] = None,
) -> None:
    """Write a checkpoint in another dtype or quantization. The same command again goes on where it was cut off."""
    from cluster.cli.convert import check, run

    if verify is not None:
        check(verify)
    elif source is None or target is None:
        raise typer.BadParameter("name the folder to read and the folder to write")
    else:
        run(source, target, quantization=quantization, dtype=dtype, max_shard_size=max_shard_size)


@app.command("plan-experts")
def plan_experts(
    recording: Annotated[Path, typer.Argument(help="A folder that `inference.record_routing` named.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to spread the experts over; of one stage in a pipeline.")],
    redundant: Annotated[int, typer.Option(min=0, help="Redundant experts.")] = 0,
    hosts: Annotated[int, typer.Option(min=1, help="Hosts of the ranks.")] = 1,
    train: Annotated[float, typer.Option(help="The share of the recording that the placement may know.")] = 0.5,
) -> None:
    """Try placements of experts on recorded routing."""
    from cluster.cli.plan_experts import show

    show(recording, ranks=ranks, redundant=redundant, hosts=hosts, train=train)


@app.command()
def version() -> None:
    """Show the version."""
    from importlib.metadata import version as installed

    typer.echo(installed("shoal"))
