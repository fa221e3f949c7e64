"""What changes a running cluster: drain, scale, rollout. Each is a plain function of a `World`, which tests fake."""

from __future__ import annotations
