"""The doors' certificates: read at the start, and again whenever the files have changed.

New connections get the new certificate, those that are open keep theirs. Files that cannot be read, or do not fit
together, leave the old certificate in use; the log says so.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

__all__ = ["Certificates", "TlsFiles"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """In PEM: the certificate with its chain, its key and, where clients must show one of theirs, who signs those."""

    cert: str
    key: str
    client_ca: str | None = None


class Certificates:
    """Belongs to no thread: gRPC asks from its own. Raises OSError or ValueError for files that cannot be used."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._context = _context(files)
        self._grpc_version = self._http_version = self._version()

    def for_grpc(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._grpc_configuration(),
            self._newer_for_grpc,  # type: ignore[arg-type]  # None, which the stubs do not know, means: no change
            self._files.client_ca is not None,
        )

    def for_http(self) -> ssl.SSLContext:
        """Looks at the files with every handshake."""
        first = _context(self._files)
        first.sni_callback = self._pick
        return first

    def _newer_for_grpc(self) -> grpc.ServerCertificateConfiguration | None:
        version = self._version()
        if version == self._grpc_version:
            return None
        try:
            _context(self._files)  # does what it can to refuse a pair that does not fit, which gRPC does not
            configuration = self._grpc_configuration()
        except (OSError, ValueError) as error:
            log.warning("security.tls: the files have changed and cannot be used: %s", error)
            configuration = None
        self._grpc_version = version
        return configuration

    def _pick(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        version = self._version()
        if version != self._http_version:
            self._http_version = version
            try:
                self._context = _context(self._files)
                log.info("security.tls: the new certificate is in use")
            except (OSError, ValueError) as error:
                log.warning("security.tls: the files have changed and cannot be used: %s", error)
        connection.context = self._context

    def _grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        files = self._files
        pair = (Path(files.key).read_bytes(), Path(files.cert).read_bytes())
        return grpc.ssl_server_certificate_configuration(
            [pair], None if files.client_ca is None else Path(files.client_ca).read_bytes()
        )

    def _version(self) -> tuple[tuple[int, int], ...]:
        """Changes when a file does, a file that is gone included."""
        found = []
        for name in filter(None, (self._files.cert, self._files.key, self._files.client_ca)):
            try:
                stat = Path(name).stat()
                found.append((stat.st_mtime_ns, stat.st_ino))
            except OSError:
                found.append((0, 0))
        return tuple(found)


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(files.cert, files.key)
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
