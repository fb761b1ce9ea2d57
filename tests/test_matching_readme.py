"""The README's snippet for two plain modules does what it says, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_snippet_for_two_plain_modules(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (snippet,) = [block for block in blocks if "match_modules" in block]
    assert len(snippet.strip().splitlines()) <= 10
    loading = "b.load_state_dict(states[0])"
    assert loading in snippet
    # In between, so that the function can be compared: nothing else of the snippet is changed.
    probe = "eval_mode = b.eval(); images = torch.randn(9, 3, 8, 8); before = b(images).detach()"
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(snippet.replace(loading, f"{probe}; {loading}"), names)
    after = names["b"](names["images"])  # type: ignore[operator]
    # The classifier's sum over permuted units, in another order.
    torch.testing.assert_close(after, names["before"], rtol=1e-5, atol=1e-5)
    start, reached = map(float, re.findall(r"(-?\d+\.\d+)", capsys.readouterr().out.splitlines()[-1]))
    assert reached > start
