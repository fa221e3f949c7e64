"""Compiles DeepSpeed's shared-memory collective once, ahead: `python -m workers.parallel.build`.

Left to itself DeepSpeed compiles at first use, inside a rank: a minute of silence, and a process that is killed
meanwhile leaves a lock file for which every later process waits for ever. So the installation compiles, under a
time limit, and a rank only loads what it finds (`workers.parallel.shm`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from workers.processor import instruction_sets

__all__ = ["BuildError", "build", "is_built", "library_path", "main"]

_OP = "deepspeed_shm_comm"
_TIMEOUT_S = 600.0
_TICK_S = 5.0


class BuildError(RuntimeError):
    """The op could not be compiled."""


def _folder() -> Path:
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(_OP, False))


def _fingerprint() -> dict[str, str]:
    """What a compiled op depends on; the processor, because it is compiled for this one."""
    import torch

    return {
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": sys.version,
        "cpu": instruction_sets(),
    }


def library_path() -> Path | None:
    """The compiled op, or None where it was not compiled, or for something else than what runs now."""
    folder = _folder()
    library, stamp = folder / f"{_OP}.so", folder / "shoal.json"
    try:
        fits = json.loads(stamp.read_text()) == _fingerprint()
    except (OSError, ValueError):
        return None
    return library if fits and library.is_file() else None


def is_built() -> bool:
    return library_path() is not None


def build(timeout_s: float = _TIMEOUT_S) -> Path:
    """Compiles unless that is done. Raises BuildError. Safe to call from several processes at once."""
    folder = _folder()
    with _exclusive(folder.parent / f"{_OP}.shoal-lock"):
        if (path := library_path()) is not None:
            return path
        _remove_stale_lock(folder / "lock", timeout_s)
        _compile(timeout_s)
        library = folder / f"{_OP}.so"
        if not library.is_file():
            raise BuildError(f"the compiler ended well and left no {library.name}")
        (folder / "shoal.json").write_text(json.dumps(_fingerprint()))
        return library


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """One builder at a time; unlike DeepSpeed's, this lock dies with its holder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_stale_lock(lock: Path, timeout_s: float) -> None:
    """A lock that a process of ours holds open is waited for; one that nobody holds was left by a killed one."""
    deadline_s = time.monotonic() + timeout_s
    while lock.exists() and _held_open(lock):
        if time.monotonic() > deadline_s:
            raise BuildError(f"another process still compiles ({lock})")
        _say(f"  waiting for another process that compiles ({lock})")
        time.sleep(_TICK_S)
    if lock.exists():
        _say(f"  removing a lock that a killed compilation left ({lock})")
        lock.unlink(missing_ok=True)


def _held_open(path: Path) -> bool:
    """Whether a process of ours has the file open."""
    wanted = str(path.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        # Processes and their files come and go under this walk, and other users' are closed to us.
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(process / "fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(process / "fd" / descriptor) == wanted:
                        return True
    return False


def _compile(timeout_s: float) -> None:
    """In a process group of its own, so that a time limit ends the compiler too."""
    # ninja sits beside the interpreter, and PATH need not say so.
    search_path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    command = ["/usr/bin/env", f"PATH={search_path}", sys.executable, "-c", _CHILD]
    started_s = time.monotonic()
    log_path = _folder().parent / f"{_OP}.log"
    with log_path.open("w") as log:
        child = subprocess.Popen(  # noqa: S603 -- all of it is ours
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while (passed_s := time.monotonic() - started_s) < timeout_s:
                _say(f"  compiling, {passed_s:.0f} s (about a minute)")
                try:
                    child.wait(_TICK_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if timed_out := child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                (_folder() / "lock").unlink(missing_ok=True)
    if timed_out:
        raise BuildError(f"stopped after {timeout_s:g} s; its output is in {log_path}")
    if child.returncode:
        lines = log_path.read_text().strip().splitlines()
        raise BuildError(f"{lines[-1] if lines else 'no output'} (all of it: {log_path})")


_CHILD = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=True)"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main() -> int:
    if is_built():
        _say(f"  already compiled: {library_path()}")
        return 0
    try:
        _say(f"  compiled: {build()}")
    except BuildError as error:
        _say(f"  {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
