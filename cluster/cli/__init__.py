"""The command line. Each command imports what it needs when it runs, so that `shoal --help` is quick."""

from __future__ import annotations

import sys

__all__ = ["convert_main", "main", "serve_main"]


def main() -> None:
    """`shoal`."""
    from cluster.cli.commands import app

    app(prog_name="shoal")


def serve_main() -> None:
    """`deepseek-serve`: another name of `shoal serve`."""
    from cluster.cli.commands import app

    app(args=["serve", *sys.argv[1:]], prog_name="shoal")


def convert_main() -> None:
    """`deepseek-convert`: another name of `shoal convert`."""
    from cluster.cli.commands import app

    app(args=["convert", *sys.argv[1:]], prog_name="shoal")
