"""The ramp climbs, stays, and ends."""

from __future__ import annotations

import pytest

from loadtest.ramp import Ramp


def test_it_climbs_in_equal_steps_to_the_half_and_stays() -> None:
    ramp = Ramp(num_users=10, total_s=20.0, num_steps=5)
    assert [ramp.users_at(float(second)) for second in range(0, 12, 2)] == [2, 4, 6, 8, 10, 10]
    assert ramp.users_at(19.9) == 10
    assert ramp.users_at(20.0) is None


def test_it_starts_with_someone_and_never_falls() -> None:
    ramp = Ramp(num_users=3, total_s=10.0, num_steps=7)
    users = [ramp.users_at(tenth / 10) or 0 for tenth in range(100)]
    assert users == sorted(users)
    assert users[0] == 1
    assert users[-1] == 3


def test_an_empty_ramp_is_refused() -> None:
    with pytest.raises(ValueError, match="a ramp needs"):
        Ramp(num_users=0, total_s=1.0)
