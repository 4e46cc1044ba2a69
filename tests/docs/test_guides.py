"""The code on the pages that explain how to extend the package runs as it stands there."""

import re
from pathlib import Path

from ddpm_fast import objective

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def test_the_objective_guide_runs(monkeypatch):
    # Copies, so that what the guide registers is gone afterwards.
    for table in ("PREDICTIONS", "WEIGHTINGS"):
        monkeypatch.setattr(objective, table, dict(getattr(objective, table)))
    page = (GUIDES / "add-an-objective.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), "add-an-objective.md", "exec"), {})
