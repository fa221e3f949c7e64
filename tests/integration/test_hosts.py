"""The hosts that other tests run on: apart from each other, breakable, and gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.hosts import Host, HostProcess, Hosts, make_hosts, needs_hosts
from tests.hosts.host import HOME, ROOT
from tests.integration.served import eventually

pytestmark = [needs_hosts, pytest.mark.root, pytest.mark.timeout(120)]

_PORT = 5000


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with make_hosts(3) as made:
        yield made


@pytest.fixture
def pair(hosts: Hosts) -> Iterator[tuple[Host, Host]]:
    yield hosts[0], hosts[1]
    hosts.heal()


@contextmanager
def talking(first: Host, second: Host) -> Iterator[tuple[HostProcess, HostProcess]]:
    """`first` sends to `second` all the time, which sends everything back."""
    echo = (sys.executable, "-m", "tests.hosts.echo")
    answerer = second.start(*echo, second.address, str(_PORT))
    sender = first.start(*echo, first.address, str(_PORT), second.address)
    try:
        eventually(lambda: len(sender.output) > 10, "an answer")
        yield sender, answerer
    finally:
        sender.kill()
        answerer.kill()


def grows(process: HostProcess) -> bool:
    """Whether it writes anything within half a second."""
    before = len(process.output)
    give_up_s = time.monotonic() + 0.5
    while time.monotonic() < give_up_s:
        if len(process.output) > before:
            return True
        time.sleep(0.02)
    return False


def test_hosts_share_neither_names_nor_folders_nor_processes(pair: tuple[Host, Host]) -> None:
    first, second = pair
    assert [host.run("hostname").stdout.strip() for host in pair] == ["host-1", "host-2"]
    for folder in ("/tmp", "/dev/shm", str(HOME), "/run"):
        first.run("touch", f"{folder}/mark")
        assert second.run("test", "-e", f"{folder}/mark", check=False).returncode == 1
        assert not Path(folder, "mark").exists()
    sleeper = first.start("sleep", "1000")
    eventually(lambda: len(first.processes("sleep 1000")) == 1, "it is found")
    assert not second.processes("sleep 1000")
    assert "sleep" not in second.run("sh", "-c", "cat /proc/[0-9]*/comm").stdout
    sleeper.kill()
    eventually(lambda: not first.processes("sleep 1000"), "it ends with what entered for it")


def test_folders_can_be_written_from_outside(pair: tuple[Host, Host]) -> None:
    first, second = pair
    first.write(".config/mark", "ours")
    first.outside("/tmp/mark").write_text("ours, too")
    shown = ("cat", f"{HOME}/.config/mark", "/tmp/mark")
    assert first.run(*shown).stdout == "oursours, too"
    assert second.run(*shown, check=False).returncode == 1


def test_the_repository_is_there_and_runs(pair: tuple[Host, Host]) -> None:
    for host in pair:
        assert host.run(sys.executable, "-c", "import cluster; print(cluster.__file__)").stdout.startswith(str(ROOT))


def test_a_pulled_cable_and_a_silent_switch(hosts: Hosts, pair: tuple[Host, Host]) -> None:
    first, second = pair
    with talking(first, second) as (sender, answerer):
        for cut in ((second,), (first, second)):
            hosts.cut(*cut)
            eventually(lambda: not grows(sender) and not grows(answerer), "silence")
            hosts.heal()
            eventually(lambda: grows(sender), "it is heard again")


def test_a_cut_between_two_leaves_the_third(hosts: Hosts, pair: tuple[Host, Host]) -> None:
    first, second = pair
    hosts.cut(first, second)
    with talking(hosts[2], second) as (sender, _):
        assert grows(sender)
    with pytest.raises(AssertionError, match="an answer"):
        eventually_talks(first, second)


def eventually_talks(first: Host, second: Host) -> None:
    """Like `talking`, without much patience."""
    answerer = second.start(sys.executable, "-m", "tests.hosts.echo", second.address, str(_PORT))
    sender = first.start(sys.executable, "-m", "tests.hosts.echo", first.address, str(_PORT), second.address)
    try:
        eventually(lambda: len(sender.output) > 10, "an answer", timeout_s=2)
    finally:
        sender.kill()
        answerer.kill()


def test_a_cut_one_way(hosts: Hosts, pair: tuple[Host, Host]) -> None:
    first, second = pair
    with talking(first, second) as (sender, answerer):
        hosts.cut_one_way(second, first)
        eventually(lambda: not grows(sender), "no answer comes back")
        assert grows(answerer), "what it is asked still arrives"
        hosts.heal()
        eventually(lambda: grows(sender), "answers again")


def test_a_slow_cable(hosts: Hosts, pair: tuple[Host, Host]) -> None:
    first, second = pair
    size = 1_000_000
    serve = f"import socket; s = socket.create_server(('', {_PORT})); c = s.accept()[0]; c.sendall(b'x' * {size})"
    take = (
        "import socket, sys, time; t = time.monotonic()\n"
        f"c = socket.create_connection(('{first.address}', {_PORT})); c.settimeout(60)\n"
        "n = sum(iter(lambda: len(c.recv(65536)), 0)); print(n, time.monotonic() - t)"
    )

    def seconds() -> float:
        server = first.start(sys.executable, "-c", serve)
        eventually(lambda: f":{_PORT}" in first.run("ss", "-Hltn").stdout, "it listens")
        count, took = second.run(sys.executable, "-c", take).stdout.split()
        server.kill()
        assert int(count) == size
        return float(took)

    quick = seconds()
    hosts.slow(second, 8_000_000)
    assert seconds() > max(0.8, 2 * quick)
    hosts.heal()
    assert seconds() < 0.8


def test_a_frozen_host_says_nothing_and_comes_back(hosts: Hosts, pair: tuple[Host, Host]) -> None:
    first, second = pair
    with talking(first, second) as (sender, _):
        hosts.freeze(second)
        eventually(lambda: not grows(sender), "silence")
        hosts.heal()
        eventually(lambda: grows(sender), "it goes on")


def test_a_killed_host_is_gone_without_a_goodbye_and_boots_again(hosts: Hosts, pair: tuple[Host, Host]) -> None:
    first, second = pair
    second.run("touch", "/tmp/kept")
    serve = f"import socket; s = socket.create_server(('', {_PORT})); c = s.accept(); s.accept()"
    second.start(sys.executable, "-c", serve)
    eventually(lambda: f":{_PORT}" in second.run("ss", "-Hltn").stdout, "it listens")
    script = (
        "import socket\n"
        f"c = socket.create_connection(('{second.address}', {_PORT})); c.settimeout(2); print('open', flush=True)\n"
        "try: c.recv(1); print('closed')\n"
        "except TimeoutError: print('silence')"
    )
    client = first.start(sys.executable, "-c", script)
    eventually(lambda: "open" in client.output, "connected")
    hosts.kill(second)
    assert not second.alive
    client.wait(10)
    assert client.output.split() == ["open", "silence"]
    hosts.boot(second)
    assert second.run("ls", "/tmp").stdout.split().count("kept") == 1
    with talking(first, second) as (sender, _):
        assert grows(sender)


_OWNER = """
import sys, time
from tests.hosts import make_hosts
with make_hosts(2) as hosts:
    hosts[0].start("sleep", "1000")
    hosts[1].run("true")
    print(hosts[0].folder.parent, *(host.pid for host in hosts), flush=True)
    time.sleep(1000)
"""


@contextmanager
def another_run() -> Iterator[tuple[subprocess.Popen[str], Path, list[psutil.Process]]]:
    """Hosts of another process: itself, their folder and first processes."""
    owner = subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout is not None
    with owner.stdout:
        folder, *pids = owner.stdout.readline().split()
        try:
            yield owner, Path(folder), [psutil.Process(int(pid)) for pid in pids]
        finally:
            owner.kill()
            owner.wait()


def bridge(folder: Path) -> Path:
    """Where the kernel shows it while it exists."""
    _, _, pid, _, number = folder.name.split("-")
    return Path(f"/sys/class/net/shoal{pid}-{number}")


def test_a_killed_owner_leaves_nothing() -> None:
    with another_run() as (owner, folder, inits):
        assert bridge(folder).exists()
        owner.kill()
        eventually(lambda: not any(init.is_running() for init in inits), "no process")
        eventually(lambda: not folder.exists() and not bridge(folder).exists(), "no folder, no bridge")


def test_what_even_the_watcher_left_is_reaped_by_the_next_run(hosts: Hosts) -> None:
    with another_run() as (owner, folder, inits):
        (watcher,) = [
            child for child in psutil.Process(owner.pid).children() if "leftovers.py" in " ".join(child.cmdline())
        ]
        watcher.kill()
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        eventually(lambda: not any(init.is_running() for init in inits), "no process, watcher or not")
        assert folder.exists()
        assert bridge(folder).exists()
        with make_hosts(1) as others:
            assert others.network.subnet != hosts.network.subnet
            assert not folder.exists()
            assert not bridge(folder).exists()
    assert all(host.alive for host in hosts), "those of living owners stay"
