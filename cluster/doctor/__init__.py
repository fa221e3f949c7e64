"""`shoal doctor`: what would keep a cluster from starting, found on every node, each with its fix.

`gather` looks at one machine, `checks` judge what was seen on all of them, `links` measures between every two, and
`report` shows it.
"""

from __future__ import annotations
