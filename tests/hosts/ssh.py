"""SSH into hosts: one key for all of them, and a server on each."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.hosts.harness import Hosts
from tests.hosts.host import HOME, Host
from tests.integration.served import eventually

__all__ = ["KEY", "open_ssh"]

KEY = ".ssh/id_ed25519"
_OPTIONS = ("PermitRootLogin=prohibit-password", "StrictModes=no", "UsePAM=no", "PrintMotd=no", "PrintLastLog=no")


def open_ssh(hosts: Hosts, folder: Path, servers: tuple[Host, ...]) -> None:
    """Every host may log in as root on the `servers`, whose addresses are their names."""
    for name in ("user", "host"):
        command = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    for host in hosts:
        host.write(KEY, (folder / "user").read_text())
        host.write(".ssh/authorized_keys", (folder / "user.pub").read_text())
        host.write(".ssh/host_key", (folder / "host").read_text())
        host.outside(HOME / ".ssh").chmod(0o700)
    for host in servers:
        options = [word for option in _OPTIONS for word in ("-o", option)]
        address = ("-o", f"ListenAddress={host.address}")
        host.start(
            "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", str(HOME / ".ssh/host_key"), *address, *options
        )
    for host in servers:
        eventually(lambda host=host: ":22" in host.run("ss", "-Hltn").stdout, f"{host} listens")  # type: ignore[misc]
