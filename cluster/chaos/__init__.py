"""Faults on purpose, a load that notices what they cost, and the report of both."""

from __future__ import annotations
