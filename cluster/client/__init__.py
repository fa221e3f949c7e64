"""A client of the gRPC door whose streams survive the front door that began them."""

from __future__ import annotations
