"""The short names that `shoal` knows."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT", "MODELS", "RegisteredModel", "find"]

DEFAULT = "smollm2-135m"


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredModel:
    """`repo_id` is a Hugging Face name; the embedded default has none, it comes from the package index."""

    name: str
    repo_id: str | None
    architecture: str  # config.json's model_type
    parameters: str


def _hub(name: str, repo: str, architecture: str, parameters: str) -> RegisteredModel:
    return RegisteredModel(name=name, repo_id=f"deepseek-ai/{repo}", architecture=architecture, parameters=parameters)


MODELS: dict[str, RegisteredModel] = {
    model.name: model
    for model in (
        RegisteredModel(name=DEFAULT, repo_id=None, architecture="llama", parameters="135 M"),
        _hub("r1-distill-qwen-1.5b", "DeepSeek-R1-Distill-Qwen-1.5B", "qwen2", "1.5 B"),
        _hub("r1-distill-qwen-7b", "DeepSeek-R1-Distill-Qwen-7B", "qwen2", "7.6 B"),
        _hub("r1-distill-llama-8b", "DeepSeek-R1-Distill-Llama-8B", "llama", "8 B"),
        _hub("r1-0528-qwen3-8b", "DeepSeek-R1-0528-Qwen3-8B", "qwen3", "8.2 B"),
        _hub("r1-distill-qwen-14b", "DeepSeek-R1-Distill-Qwen-14B", "qwen2", "14.8 B"),
        _hub("r1-distill-qwen-32b", "DeepSeek-R1-Distill-Qwen-32B", "qwen2", "32.8 B"),
        _hub("r1-distill-llama-70b", "DeepSeek-R1-Distill-Llama-70B", "llama", "70.6 B"),
        _hub("v2-lite", "DeepSeek-V2-Lite", "deepseek_v2", "15.7 B"),
        _hub("v2-lite-chat", "DeepSeek-V2-Lite-Chat", "deepseek_v2", "15.7 B"),
        _hub("v2", "DeepSeek-V2", "deepseek_v2", "235.7 B"),
        _hub("v2.5", "DeepSeek-V2.5", "deepseek_v2", "235.7 B"),
        _hub("v3", "DeepSeek-V3", "deepseek_v3", "671 B"),
        _hub("v3-0324", "DeepSeek-V3-0324", "deepseek_v3", "671 B"),
        _hub("v3.1", "DeepSeek-V3.1", "deepseek_v3", "671 B"),
        _hub("r1", "DeepSeek-R1", "deepseek_v3", "671 B"),
        _hub("r1-0528", "DeepSeek-R1-0528", "deepseek_v3", "671 B"),
    )
}


def find(name: str) -> RegisteredModel | None:
    """The model of a short name; `deepseek-` in front and capitals are the same name."""
    return MODELS.get(name.lower().removeprefix("deepseek-"))
