"""How commands reach a front door: in the clear, or by TLS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.failure import fail

if TYPE_CHECKING:
    import grpc

__all__ = ["CaOption", "CertOption", "PrivateKeyOption", "Tls", "TlsOption"]

_ON, _CA, _CERT, _KEY = "SHOAL_TLS", "SHOAL_TLS_CA", "SHOAL_TLS_CERT", "SHOAL_TLS_KEY"

TlsOption = Annotated[bool, typer.Option("--tls", envvar=_ON, help="Speak TLS; the system knows who signs.")]
CaOption = Annotated[
    Path | None,
    typer.Option("--tls-ca", envvar=_CA, help="Speak TLS; this file knows who signs.", show_default=False),
]
CertOption = Annotated[
    Path | None,
    typer.Option("--tls-cert", envvar=_CERT, help="A certificate of one's own.", show_default=False),
]
PrivateKeyOption = Annotated[Path | None, typer.Option("--tls-key", envvar=_KEY, help="Its key.", show_default=False)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """`ca` alone speaks TLS too; `cert` and `key` are for servers that want to know who comes."""

    enabled: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def from_environment(cls) -> Tls:
        """For commands without these options."""
        from cluster.config.environment import variable  # only now, as below

        ca, cert, key = (variable(name) for name in (_CA, _CERT, _KEY))
        return cls(
            enabled=variable(_ON) is not None,
            ca=Path(ca) if ca else None,
            cert=Path(cert) if cert else None,
            key=Path(key) if key else None,
        )

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: in the clear. Ends the program where a file cannot be read."""
        import grpc  # only now: the options above are imported to show the help

        if not (self.enabled or self.ca or self.cert or self.key):
            return None
        if (self.cert is None) != (self.key is None):
            fail("--tls-cert and --tls-key go together")
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))

    def channel(self, address: str) -> grpc.Channel:
        """The connection opens with the first call. Ends the program where a file cannot be read."""
        import grpc

        from cluster.client.held import CHANNEL_OPTIONS

        credentials = self.credentials()
        if credentials is None:
            return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"{path}: {error.strerror}")
