"""A ramp for the Locust users, to the number of users and the run time given on the command line.

locust -f loadtest/locustfile.py,loadtest/locust_ramp.py --headless -u 20 -t 120s --host grpc://127.0.0.1:9000
"""

from __future__ import annotations

from typing import ClassVar

from locust import LoadTestShape

from loadtest.ramp import Ramp

__all__ = ["RampShape"]


class RampShape(LoadTestShape):  # type: ignore[misc]  # Locust is not followed
    """Spawns each step's users at once; `-r` bounds how quickly."""

    use_common_options: ClassVar[bool] = True

    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        ramp = Ramp(num_users=options.num_users or 1, total_s=options.run_time or 60.0)
        users = ramp.users_at(self.get_run_time())
        return None if users is None else (users, options.spawn_rate or ramp.num_users)
