"""LangChain and LangGraph: the same chains, agents and graphs with answers as each user wants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    from amulet_integrations.langchain import memory, middleware

    return getattr(memory, name, None) or getattr(middleware, name)
