"""The ahead-of-time build, but for the compiler's minute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workers.parallel import build


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "op"
    folder.mkdir()
    monkeypatch.setattr(build, "_folder", lambda: folder)
    return folder


def test_only_what_was_compiled_for_this_machine_counts(folder: Path) -> None:
    assert not build.is_built()
    (folder / "deepspeed_shm_comm.so").touch()
    assert not build.is_built()  # nobody says what for
    (folder / "shoal.json").write_text(json.dumps({**build._fingerprint(), "cpu": "another"}))
    assert not build.is_built()
    (folder / "shoal.json").write_text(json.dumps(build._fingerprint()))
    assert build.library_path() == folder / "deepspeed_shm_comm.so"
    (folder / "deepspeed_shm_comm.so").unlink()
    assert not build.is_built()


def test_a_lock_of_a_killed_compilation_is_removed(folder: Path) -> None:
    lock = folder / "lock"
    lock.touch()
    build._remove_stale_lock(lock, timeout_s=1)
    assert not lock.exists()


def test_a_lock_that_is_held_is_respected(folder: Path) -> None:
    lock = folder / "lock"
    with lock.open("w"), pytest.raises(build.BuildError, match="still compiles"):
        build._remove_stale_lock(lock, timeout_s=-1)
    assert lock.exists()


def test_a_compiler_that_hangs_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_CHILD", "import signal; signal.pause()")
    monkeypatch.setattr(build, "_TICK_S", 0.05)
    (folder / "lock").touch()
    with pytest.raises(build.BuildError, match=r"stopped after 0\.1 s"):
        build._compile(0.1)
    assert not (folder / "lock").exists()


def test_a_compiler_that_fails_is_quoted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_CHILD", "raise SystemExit('no g++ here')")
    with pytest.raises(build.BuildError, match=r"no g\+\+ here"):
        build.build(timeout_s=20)


def test_a_build_leaves_its_mark(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = folder / "deepspeed_shm_comm.so"
    monkeypatch.setattr(build, "_CHILD", f"open({str(library)!r}, 'w').close()")
    assert build.build(timeout_s=20) == library
    assert build.is_built()
    library.write_text("kept")
    assert build.build(timeout_s=20).read_text() == "kept"
