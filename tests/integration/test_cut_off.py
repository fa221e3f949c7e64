"""`cut_off` in a network of its own: packets are dropped, nobody is told, and after a while all goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from cluster.app import cut_off

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.getuid() != 0, reason="a network of its own needs root"),
    pytest.mark.skipif(shutil.which("nft", path="/usr/sbin:/usr/bin") is None, reason="nftables is not installed"),
]

SCRIPT = [sys.executable, "-m", cut_off.__name__]
ECHO = """
import socket, threading
def echo(connection):
    while data := connection.recv(100):
        connection.sendall(data)
with socket.create_server(("0.0.0.0", 7000)) as server:
    print("up", flush=True)
    while True:
        threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
"""
# Says how long an answer over an open connection, and one over a new one, took: before the cut, in it, and behind it.
CLIENT = """
import json, socket, subprocess, sys, time
script, mode, addresses = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
def started(pid):
    return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[19]
def ask(connection):
    begun = time.monotonic()
    connection.sendall(b"x")
    assert connection.recv(100) == b"x"
    return time.monotonic() - begun
def connect(address):
    begun = time.monotonic()
    with socket.create_connection((address, 7000)) as connection:
        ask(connection)
    return time.monotonic() - begun
server = subprocess.Popen([sys.executable, "-c", sys.stdin.read()], stdout=subprocess.PIPE)
server.stdout.readline()
open_ones = {address: socket.create_connection((address, 7000)) for address in addresses}
before = {address: ask(one) for address, one in open_ones.items()}
what = ["node", addresses[0]] if mode == "node" else ["process", str(server.pid), started(server.pid)]
subprocess.run([*script, "4.0", *what], check=True)
while "expires" not in subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True).stdout:
    time.sleep(0.02)
spared = {address: ask(open_ones[address]) for address in addresses[1:]} if mode == "node" else {}
within = ask(open_ones[addresses[0]])
behind = connect(addresses[0])
end = time.monotonic() + 20
while subprocess.run(["nft", "list", "tables"], capture_output=True).stdout and time.monotonic() < end:
    time.sleep(0.05)
left = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
server.kill()
print(json.dumps({"before": before, "spared": spared, "within": within, "behind": behind, "left": left}))
"""


def cut(mode: str, *addresses: str) -> dict[str, object]:
    command = [sys.executable, "-c", CLIENT, json.dumps(SCRIPT), mode, *addresses]
    own = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *command]
    done = subprocess.run(own, input=ECHO, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize(("mode", "addresses"), [("process", ["127.0.0.1"]), ("node", ["127.0.0.2", "127.0.0.1"])])
def test_what_is_cut_off_waits_and_goes_on(mode: str, addresses: list[str]) -> None:
    told = cut(mode, *addresses)
    within, behind = told["within"], told["behind"]
    assert isinstance(within, float)
    assert isinstance(behind, float)
    assert within > 1.0, "dropped, and sent again until it came through"
    assert behind < 1.0, "a new connection, once it is over"
    assert told["left"] == "", "nothing stays in the packet filter"
    spared = told["spared"]
    assert isinstance(spared, dict)
    assert all(seconds < 1.0 for seconds in spared.values()), "the others are reached"


def test_without_the_privilege_it_says_so() -> None:
    without = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    done = subprocess.run(
        [*without, *SCRIPT, "1", "node", "10.0.0.1"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "it needs CAP_NET_ADMIN" in done.stderr
