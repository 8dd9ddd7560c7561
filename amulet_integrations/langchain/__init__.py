"""LangChain and LangGraph: unchanged chains, agents and graphs that answer as each user prefers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amulet.errors import MissingPackageError

try:
    import langchain_core  # noqa: F401 - asked for by name so that its absence has a name
except ImportError as error:
    raise MissingPackageError(
        "amulet_integrations.langchain needs LangChain: "
        'pip install "amulet-integrations[langchain]"'
    ) from error

from amulet_integrations.langchain.chat_models import ChatAmulet
from amulet_integrations.langchain.llms import AmuletLLM

if TYPE_CHECKING:
    from amulet_integrations.langchain.memory import PreferenceMemory, with_memory
    from amulet_integrations.langchain.middleware import (
        PreferenceMiddleware,
        StatedPreference,
        remember_preference,
        state_settings,
    )

__all__ = [
    "AmuletLLM",
    "ChatAmulet",
    "PreferenceMemory",
    "PreferenceMiddleware",
    "StatedPreference",
    "remember_preference",
    "state_settings",
    "with_memory",
]


def __getattr__(name: str) -> Any:
    """Agents and stores (`langchain`, `langgraph`) are imported when first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'amulet_integrations.langchain' has no attribute {name!r}")
    try:
        import langchain  # noqa: F401
        import langgraph  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"{name} needs LangChain's agents and LangGraph: "
            'pip install "amulet-integrations[langchain]"'
        ) from error
    from amulet_integrations.langchain import memory, middleware

    return getattr(memory, name, None) or getattr(middleware, name)
