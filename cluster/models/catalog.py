"""From what the user wrote to a folder in Hugging Face layout."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.models import embedded, hub, manifest, registry
from cluster.models.errors import ModelError
from cluster.models.progress import Progress, Silent

__all__ = ["described", "model_name", "pull", "pulled_folder", "resolve"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(name_or_path: str, models_dir: Path, progress: Progress | None = None) -> Path:
    """The folder of a model, pulled first if it is known by name and not here yet. Raises ModelError."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"{path} is a file; --model-path wants the folder that holds config.json and the weights")
    return pulled_folder(name_or_path, models_dir) or pull(name_or_path, models_dir, progress)


def described(name_or_path: str, models_dir: Path) -> Path:
    """A folder with the model's config.json at least: of a Hugging Face name no more is fetched. Raises ModelError."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return resolve(name_or_path, models_dir)
    if folder := pulled_folder(name_or_path, models_dir):
        return folder
    known = registry.find(name_or_path)
    if known is not None and known.repo_id is None:
        raise ModelError(f"{known.name} is not on this machine; `shoal models pull {known.name}` fetches it")
    return hub.pull(_repo_id(name_or_path), models_dir, only=("config.json",))


def pulled_folder(name: str, models_dir: Path) -> Path | None:
    """Where the model of that name is on this machine, if it is. Raises ModelError for one that was damaged."""
    known = registry.find(name)
    if known is not None and known.repo_id is None:
        folder = models_dir / known.name
        if not folder.is_dir():
            return None
        manifest.verify(folder, contents=False)
        return folder
    repo_id = _repo_id(name)
    return hub.cached(repo_id, models_dir)


def pull(name: str, models_dir: Path, progress: Progress | None = None) -> Path:
    """Fetches the model of that name, or checks every byte of one that is here. Raises ModelError."""
    known = registry.find(name)
    if known is not None and known.repo_id is None:
        folder = models_dir / known.name
        if folder.is_dir():
            manifest.verify(folder, contents=True)
        else:
            embedded.pull(folder, progress or Silent())
        return folder
    return hub.pull(_repo_id(name), models_dir)


def model_name(name_or_path: str, folder: Path) -> str:
    """What clients call the model where the configuration does not say: its name, or its folder's."""
    known = registry.find(name_or_path)
    if known is not None:
        return known.name
    return name_or_path if _REPO_ID.fullmatch(name_or_path) and not Path(name_or_path).is_dir() else folder.name


def _repo_id(name: str) -> str:
    known = registry.find(name)
    if known is not None and known.repo_id is not None:
        return known.repo_id
    if _REPO_ID.fullmatch(name):
        return name
    raise ModelError(f"no folder and no known model {name!r}; `shoal models list` shows the short names")
