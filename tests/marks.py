"""Parameters that are only tried where slow tests run."""

from typing import Any

import pytest


def slow(*values: Any, **options: Any) -> Any:
    """One set of parameters, as `pytest.param` takes it, for slow runs alone."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)
