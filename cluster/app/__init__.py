"""The deployment: a Ray to run on, the Serve app with its two deployments, and a clean end."""

from __future__ import annotations
