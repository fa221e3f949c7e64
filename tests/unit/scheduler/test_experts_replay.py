"""Placements tried on recorded routing: a load that stays is evened out, one that turns is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scheduler.experts_replay import compare, read_recording

LAYERS, EXPERTS, TOP_K = (1, 2), 16, 2


def _record(folder: Path, popular: list[int], *, tokens: int = 2048) -> None:
    """A file a popular expert: half of all tokens choose it first, the others anything."""
    draw = np.random.default_rng(3)
    for number, expert in enumerate(popular):
        experts = draw.integers(0, EXPERTS, (len(LAYERS), tokens, TOP_K)).astype(np.uint16)
        experts[:, : tokens // 2, 0] = expert
        np.savez_compressed(folder / f"00001-{number:06d}-r.npz", experts=experts, layers=LAYERS, num_experts=EXPERTS)


def test_what_stays_loaded_is_evened_out(tmp_path: Path) -> None:
    _record(tmp_path, [5, 5])
    recording = read_recording(tmp_path)
    assert recording.num_choices == 2 * 2048 * len(LAYERS) * TOP_K
    contiguous, balanced, bound = compare(recording, 4, redundant=4)
    assert contiguous.imbalance > 1.5
    assert balanced.imbalance < 1.1
    assert bound.imbalance <= balanced.imbalance + 0.01
    assert sum(balanced.carried) == pytest.approx(sum(contiguous.carried)) == recording.num_choices / 2


def test_a_placement_does_not_know_what_it_is_judged_on(tmp_path: Path) -> None:
    _record(tmp_path, [5, 9])
    _, balanced, bound = compare(read_recording(tmp_path), 4, redundant=4)
    assert balanced.imbalance > 1.4
    assert bound.imbalance < 1.1


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recorded routing"):
        read_recording(tmp_path)
    _record(tmp_path, [5], tokens=100)
    with pytest.raises(ValueError, match="cannot be split"):
        compare(read_recording(tmp_path), 4)
    _record(tmp_path, [5, 5])
    with pytest.raises(ValueError, match="over 17 ranks; 16 or less would do"):
        compare(read_recording(tmp_path), 17)
    with pytest.raises(ValueError, match="do not divide by 6 ranks; 8 redundant ones would"):
        compare(read_recording(tmp_path), 6, redundant=3)
    experts = np.zeros((1, 5, 2), np.uint16)
    np.savez_compressed(tmp_path / "z.npz", experts=experts, layers=(3,), num_experts=EXPERTS)
    with pytest.raises(ValueError, match="another model"):
        read_recording(tmp_path)
