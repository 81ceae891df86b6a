"""A review server while a test runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prune_viz.report.review_server import ReviewServer


@contextmanager
def serving(server: ReviewServer) -> Iterator[ReviewServer]:
    """Serve; in the end all connections have ended."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
        for _ in range(server.most):
            assert server._free.acquire(timeout=5), "a connection hangs"
