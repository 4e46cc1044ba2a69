"""What the tests of the train command train on."""

import pytest
from support.train_command import pictures


@pytest.fixture
def data(tmp_path):
    """Two classes of four pictures."""
    return pictures(tmp_path / "data", ["cat", "dog"])
