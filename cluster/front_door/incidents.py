"""Unexpected errors: the log has the story, the client an id to ask for it."""

from __future__ import annotations

import logging
import secrets

from cluster.front_door.errors import InternalError

__all__ = ["incident"]

log = logging.getLogger(__name__)


def incident(error: BaseException, during: str) -> InternalError:
    """Logs `error` with its traceback; what it returns holds nothing of it but the incident's id."""
    incident_id = secrets.token_hex(6)
    log.error("incident %s during %s", incident_id, during, exc_info=error)
    return InternalError(f"internal error; the server's log tells more under incident {incident_id}")
