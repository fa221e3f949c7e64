"""Models by Hugging Face name, into Hugging Face's own cache layout under our folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.models.errors import ModelError

__all__ = ["cached", "pull"]

# Never pickles, never code.
_ALLOWED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def cached(repo_id: str, models_dir: Path) -> Path | None:
    """The newest complete snapshot on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo_id, cache_dir=models_dir / "hub", allow_patterns=list(_ALLOWED), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def pull(repo_id: str, models_dir: Path, *, only: Sequence[str] = _ALLOWED) -> Path:
    """Files that match one of `only`. Raises ModelError in one line: no hub, no such model, or no permission."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo_id, cache_dir=models_dir / "hub", allow_patterns=list(only)))
    except GatedRepoError:
        raise ModelError(f"{repo_id} is gated: accept its terms on the hub, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelError(f"the hub has no model {repo_id} (or HF_TOKEN does not let you see it)") from None
    except HFValidationError:
        raise ModelError(f"{repo_id!r} is neither a folder nor a model's name") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ModelError(
            f"cannot fetch {repo_id}: no model hub is reachable ({reason}); give a local folder with --model-path"
        ) from None
