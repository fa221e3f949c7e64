"""An event loop beside the test, for a client or a server that goes on while the test waits for something else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager


@contextmanager
def loop_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """Runs in a thread of its own. In the end what still runs in it is cancelled, and the loop closed."""
    running: Future[asyncio.AbstractEventLoop] = Future()

    def run() -> None:
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            running.set_result(loop)
            loop.run_forever()

    thread = threading.Thread(target=run, name="loop")
    thread.start()
    loop = running.result()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
