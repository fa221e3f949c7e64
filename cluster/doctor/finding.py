"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Finding", "Level", "failure", "passed", "warning"]


class Level(StrEnum):
    """A warning costs speed or comfort, a failure the start."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """`node` is a machine's name, or two for what lies between them; empty where it concerns all. Only what is ok
    needs no `fix`."""

    check: str
    node: str
    level: Level
    text: str
    fix: str = ""

    def __str__(self) -> str:
        where = f" on {self.node}" if self.node else ""
        return f"{self.check}{where}: {self.text}" + (f"; fix: {self.fix}" if self.fix else "")


def passed(check: str, node: str, text: str) -> Finding:
    return Finding(check=check, node=node, level=Level.OK, text=text)


def warning(check: str, node: str, text: str, fix: str) -> Finding:
    return Finding(check=check, node=node, level=Level.WARNING, text=text, fix=fix)


def failure(check: str, node: str, text: str, fix: str) -> Finding:
    return Finding(check=check, node=node, level=Level.FAILURE, text=text, fix=fix)
