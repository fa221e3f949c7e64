"""`shoal chat`: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.connection import CaOption, CertOption, PrivateKeyOption, Tls, TlsOption

__all__ = ["chat"]


def chat(
    address: Annotated[str, typer.Option(help="A front door's gRPC address.")] = "127.0.0.1:9000",
    model: Annotated[str, typer.Option(help="By default the one that is served.", show_default=False)] = "",
    api_key: Annotated[
        str | None, typer.Option(envvar="SHOAL_API_KEY", help="Sent as a bearer token.", show_default=False)
    ] = None,
    system: Annotated[str, typer.Option(help="What the model is told first.", show_default=False)] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The longest answer.", show_default=False)] = None,
    tls: TlsOption = False,
    tls_ca: CaOption = None,
    tls_cert: CertOption = None,
    tls_key: PrivateKeyOption = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Ask this, print the answer and leave.", show_default=False)
    ] = None,
) -> None:
    """Chat with a running server. Ctrl-C interrupts an answer; /help shows the commands."""
    from cluster.cli.chat_client import Conversation, connect
    from cluster.cli.chat_terminal import run

    with connect(address, api_key, Tls(enabled=tls, ca=tls_ca, cert=tls_cert, key=tls_key)) as server:
        conversation = Conversation(server, model=model, system=system, temperature=temperature, max_tokens=max_tokens)
        code = run(conversation, message)
    raise typer.Exit(code)
