"""Which of Ray's nodes are there."""

from __future__ import annotations

import socket
from typing import Any

from cluster.doctor.nodes import living_nodes


def node(name: str, port: int, *, address: str = "127.0.0.1", alive: bool = True) -> dict[str, Any]:
    return {"NodeManagerHostname": name, "NodeManagerAddress": address, "NodeManagerPort": port, "Alive": alive}


def test_of_two_nodes_at_one_address_the_one_that_listens_lives() -> None:
    """The other one has ended, and Ray has not noticed yet."""
    with socket.create_server(("127.0.0.1", 0)) as raylet, socket.create_server(("127.0.0.1", 0)) as ended:
        gone = node("b", ended.getsockname()[1])
        ended.close()
        back = node("b", raylet.getsockname()[1])
        elsewhere = node("a", gone["NodeManagerPort"], address="192.0.2.1")
        lost = node("b", raylet.getsockname()[1], alive=False)
        assert living_nodes([gone, lost, back, elsewhere]) == [elsewhere, back]
        assert living_nodes([gone, elsewhere]) == [elsewhere, gone], "alone at its address it is asked"
