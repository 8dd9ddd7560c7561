"""Every Python snippet of the README runs as it stands, on the embedded model."""

from __future__ import annotations

import asyncio
import gc
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
WHOLE = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# Those that need a server run in tests/serve/test_docs.py.
SNIPPETS = [snippet for snippet in WHOLE if "http://127.0.0.1" not in snippet]
NEED_THE_HUB = [
    'amulet = Amulet.from_pretrained("Qwen/Qwen3-0.6B", dtype="auto", device_map="auto")'
]


def test_only_downloads_are_left_out() -> None:
    skipped = re.findall(r"^```python no-run\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert [snippet.splitlines()[-1] for snippet in skipped] == NEED_THE_HUB
    assert README.count("```python") == len(WHOLE) + len(skipped)


# LlamaIndex runs its coroutines in event loops that it does not close.
@pytest.mark.filterwarnings(
    "ignore:.*(GuardedSocket|BaseEventLoop):pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1][:40])
def test_snippet_runs(
    snippet: str,
    embedded: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})
    asyncio.set_event_loop(None)  # let go of what it left,
    gc.collect()  # while this test's filter holds
    assert capsys.readouterr().out.strip()
