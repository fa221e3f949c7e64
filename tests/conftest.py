"""How the tests are spread over processes (`pytest -n auto --dist loadscope --no-loadscope-reorder`).

First come those that do not mind what else runs, a file at a time on every core. Those that do, most of them because
what they start is killed or held to a time, come last, one after the other, so that they have the machine for
themselves.
"""

from __future__ import annotations

from typing import Any

import pytest

# What is in tests/integration/ has its turn alone, but for these.
_BESIDE_OTHERS = frozenset(
    f"tests/integration/{name}.py"
    for name in (
        "test_admin_door",
        "test_autotp",
        "test_chat_command",
        "test_cut_off",
        "test_default_model",
        "test_door_scheduling",
        "test_frozen_peers",
        "test_grpc_door",
        "test_grpc_door_failures",
        "test_grpc_session",
        "test_guided_doors",
        "test_guided_served",
        "test_guided_session",
        "test_http_door",
        "test_link_probe",
        "test_load_locust",
        "test_load_peers",
        "test_load_scenario",
        "test_rate_limits",
        "test_resume_elsewhere",
        "test_serve_plans",
        "test_tls",
        "test_traces",
    )
)


def _alone(path: str) -> bool:
    return path.startswith("tests/integration/") and path not in _BESIDE_OTHERS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _alone(item.nodeid.partition("::")[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Turns(LoadScopeScheduling):  # type: ignore[misc]  # xdist is not typed
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "alone" if _alone(path) else path

    return Turns(config, log)
