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
    assert sum(balanced.carried[0]) == pytest.approx(sum(contiguous.carried[0])) == recording.num_choices / 2


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
    for layers, num_experts in (((2, 3), EXPERTS), ((3, 4), EXPERTS + 1)):
        experts = np.zeros((2, 5, 2), np.uint16)
        np.savez_compressed(tmp_path / "z.npz", experts=experts, layers=layers, num_experts=num_experts)
        with pytest.raises(ValueError, match="another model"):
            read_recording(tmp_path)


def test_stages_that_wrote_for_themselves_are_judged_together(tmp_path: Path) -> None:
    """However the choices of a pipeline's stages are spread over files: as if one rank had written all layers."""
    whole, stages = tmp_path / "whole", tmp_path / "stages"
    whole.mkdir()
    stages.mkdir()
    _record(whole, [5, 9, 5, 5])
    experts = []
    for path in sorted(whole.glob("*.npz")):
        with np.load(path) as file:
            experts.append(file["experts"])
            np.savez(stages / f"{path.stem}-last.npz", experts=experts[-1][1:], layers=LAYERS[1:], num_experts=EXPERTS)
    first = np.concatenate(experts, axis=1)[:1]
    np.savez(stages / "00001-000000-first.npz", experts=first, layers=LAYERS[:1], num_experts=EXPERTS)
    together, apart = read_recording(whole), read_recording(stages)
    assert (apart.layers, apart.num_choices) == (together.layers, together.num_choices)
    for expected, found in zip(compare(together, 4, redundant=4), compare(apart, 4, redundant=4), strict=True):
        assert found.imbalance == pytest.approx(expected.imbalance)
        assert np.sum(found.carried, axis=0) == pytest.approx(expected.carried[0])
