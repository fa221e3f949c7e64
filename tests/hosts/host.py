"""One host: namespaces of its own, and what can be run and broken in it."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

__all__ = ["HOME", "ROOT", "Host", "HostProcess"]

ROOT = Path(__file__).parents[2]
HOME = Path(pwd.getpwuid(0).pw_dir)
_SHARED_MEMORY_BYTES = 4 << 30
_START_TIMEOUT_S = 30.0
# The kernel ends what it starts when this process ends, however it ends.
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
_NAMESPACES = ("--pid", "--net", "--mount", "--uts", "--ipc")


class HostProcess:
    """A process in a host, as seen from outside."""

    def __init__(self, entering: subprocess.Popen[bytes], output: Path) -> None:
        self._entering = entering  # `nsenter`, which waits for it and ends as it does
        self.output_path = output

    @property
    def pid(self) -> int:
        """Outside. Raises psutil.NoSuchProcess where it has ended."""
        give_up_s = time.monotonic() + _START_TIMEOUT_S
        while not (children := psutil.Process(self._entering.pid).children()):
            if self._entering.poll() is not None or time.monotonic() > give_up_s:
                raise psutil.NoSuchProcess(self._entering.pid)
            time.sleep(0.01)
        return children[0].pid

    @property
    def output(self) -> str:
        """What it has written so far, both streams together."""
        return self.output_path.read_text(errors="replace")

    def poll(self) -> int | None:
        return self._entering.poll()

    def wait(self, timeout_s: float) -> int:
        return self._entering.wait(timeout_s)

    def send(self, number: signal.Signals) -> None:
        """A signal, for the process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Together with nothing else; safe to repeat."""
        self._entering.kill()
        self._entering.wait()


class Host:
    """Made by `tests.hosts.harness`; `address` is reachable from the other hosts and from the machine itself."""

    def __init__(self, name: str, address: str, folder: Path, names_file: Path) -> None:
        self.name = name
        self.address = address
        self.folder = folder
        self._names_file = names_file
        self._init: subprocess.Popen[str] | None = None
        self._pid = 0
        self._count = 0
        self._started: list[HostProcess] = []

    def __repr__(self) -> str:
        return f"{self.name} ({self.address})"

    @property
    def alive(self) -> bool:
        return self._init is not None and self._init.poll() is None

    @property
    def pid(self) -> int:
        """The host's first process, seen from outside."""
        assert self.alive, f"{self} is not running"
        return self._pid

    def outside(self, path: str | Path) -> Path:
        """Where the machine finds a path that the host has below its /tmp or HOME."""
        for inside, backing in self._covered.items():
            if Path(path).is_relative_to(inside):
                return backing / Path(path).relative_to(inside)
        raise ValueError(f"{path} is neither below /tmp nor below {HOME}")

    @property
    def _covered(self) -> dict[str, Path]:
        """/tmp is last: the folders that cover the others are below it."""
        return {str(HOME): self.folder / "home", "/tmp": self.folder / "tmp"}

    def boot(self, shared: Sequence[Path]) -> None:
        """Starts it, without a cable; `shared` are paths of the machine that it sees although they are in /tmp or
        HOME."""
        assert not self.alive, f"{self} is running already"
        kept = [ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix), HOME / ".cache/torch_extensions", *shared]
        told = {
            "name": self.name,
            "covered": {inside: str(backing) for inside, backing in self._covered.items()},
            "kept": [str(path) for path in kept if path.exists()],
            "names_file": str(self._names_file),
            "shared_memory_bytes": _SHARED_MEMORY_BYTES,
        }
        script = str(Path(__file__).with_name("boot.py"))
        errors = self.folder / "boot-errors"
        with errors.open("w") as file:
            self._init = subprocess.Popen(
                [
                    *_DIES_WITH_US,
                    *("unshare", "--fork", "--kill-child", "--mount-proc", *_NAMESPACES, "--"),
                    *(sys.executable, "-I", "-S", script, json.dumps(told)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        assert self._init.stdout is not None
        with self._init.stdout as told_back:
            line = told_back.readline()
        if line != "up\n":
            self._init.kill()
            self._init.wait()
            raise RuntimeError(f"{self} did not boot: {errors.read_text()}")
        (child,) = psutil.Process(self._init.pid).children()
        self._pid = child.pid

    def net(self, *command: str) -> str:
        """A command of the machine in the host's network alone."""
        entered = ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")
        return subprocess.run([*entered, *command], check=True, capture_output=True, text=True).stdout

    def run(
        self, *command: str, timeout_s: float = 60.0, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end; with `check` a failing one fails the test and shows what it wrote."""
        done = subprocess.run(
            self._entered(command, env), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check:
            assert done.returncode == 0, f"{self}: {' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def start(self, *command: str, env: Mapping[str, str] | None = None) -> HostProcess:
        """A command that goes on; its output is in a file."""
        self._count += 1
        output = self.folder / f"output-{self._count}"
        with output.open("wb") as file:
            process = HostProcess(self._popen(command, env, file), output)
        self._started.append(process)
        return process

    def processes(self, containing: str = "") -> list[psutil.Process]:
        """Those whose command line contains the text, seen from outside."""
        ours = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == ours
                if inside and containing in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def freeze(self) -> None:
        """Stops every process, as a hanging machine would; new ones are stopped until none is left."""
        while running := [process for process in self.processes() if process.status() != psutil.STATUS_STOPPED]:
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
            time.sleep(0.01)

    def thaw(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def power_off(self) -> None:
        """Ends every process at once. Pull the cable first, or the kernel says goodbye for them."""
        if self._init is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        # Before the wait: the host's first process ends after all others are reaped, and who entered for one of those
        # that was stopped is stopped, too, and reaps nobody.
        while self._started:
            self._started.pop().kill()
        if self._init is not None:
            self._init.wait()

    def write(self, path: str, text: str, mode: int = 0o600) -> None:
        """A file below HOME, where `path` is relative to it."""
        target = self.outside(HOME / path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch(mode=mode)
        target.write_text(text)

    def _entered(self, command: Sequence[str], env: Mapping[str, str] | None) -> list[str]:
        """Nothing of the machine's environment comes along."""
        variables = {
            "HOME": str(HOME),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(ROOT),
            "TERM": "dumb",
            "USER": "root",
            **(env or {}),
        }
        return [
            *_DIES_WITH_US,
            *("nsenter", "--target", str(self.pid), *_NAMESPACES, "--"),
            *_DIES_WITH_US,
            *("env", "-i", f"--chdir={HOME}", *(f"{name}={value}" for name, value in variables.items())),
            *command,
        ]

    def _popen(
        self, command: Sequence[str], env: Mapping[str, str] | None, output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._entered(command, env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
