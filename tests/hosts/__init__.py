"""Several hosts on one machine: network namespaces with processes, folders and addresses of their own.

with make_hosts(2) as (first, second):
    second.run("ping", "-c1", first.address)
"""

from __future__ import annotations

from tests.hosts.harness import Hosts, make_hosts, needs_hosts, needs_sshd, obstacle
from tests.hosts.host import Host, HostProcess

__all__ = ["Host", "HostProcess", "Hosts", "make_hosts", "needs_hosts", "needs_sshd", "obstacle"]
