"""The Python code of docs/guides/add-a-sampler.md runs, and what it asserts holds."""

import re
from pathlib import Path

from ddpm_fast import samplers

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "add-a-sampler.md"


def test_the_guide_runs(monkeypatch):
    # A copy, so that what the guide registers is gone afterwards.
    monkeypatch.setattr(samplers, "SAMPLERS", dict(samplers.SAMPLERS))
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    names = {}
    exec(compile("\n".join(blocks), GUIDE.name, "exec"), names)
    assert "tempered" in samplers.SAMPLERS and names["x"].shape == (4, 1, 28, 28)
