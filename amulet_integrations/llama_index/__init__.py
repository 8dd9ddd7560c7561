"""LlamaIndex: `AmuletLLM`, and where a preference comes from."""

from __future__ import annotations

from amulet.errors import MissingPackageError

try:
    import llama_index.core  # noqa: F401 - asked for by name so that its absence has a name
except ImportError as error:  # pragma: no cover - needs an environment without the package
    raise MissingPackageError(
        "amulet_integrations.llama_index needs LlamaIndex: "
        'pip install "amulet-integrations[llama-index]"'
    ) from error

from amulet_integrations.llama_index.llm import AmuletLLM
from amulet_integrations.llama_index.memory import PreferenceMemoryBlock
from amulet_integrations.llama_index.messages import preference_message
from amulet_integrations.llama_index.scope import (
    forget_preference,
    preference,
    preference_of,
    set_preference,
)

__all__ = [
    "AmuletLLM",
    "PreferenceMemoryBlock",
    "forget_preference",
    "preference",
    "preference_message",
    "preference_of",
    "set_preference",
]
