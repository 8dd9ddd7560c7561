"""What `ChatAmulet.bind` returns: bound options survive `bind_tools` and structured output."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import _ChatModelBinding
from langchain_core.runnables import Runnable

from amulet_integrations.langchain.structured import structured_output


class AmuletBinding(_ChatModelBinding):
    """LangChain's own binding hands these methods to the bare model and forgets its keywords."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> AmuletBinding:
        """See `ChatAmulet.bind_tools`."""
        bound: Any = self.bound
        with_tools = bound.bind_tools(tools, **kwargs)
        return type(self)(
            bound=self.bound, kwargs={**self.kwargs, **with_tools.kwargs}, config=self.config
        )

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """See `ChatAmulet.with_structured_output`."""
        return structured_output(self, schema, **kwargs)

    def with_preference(self, preference: Any = None, **settings: Any) -> AmuletBinding:
        """See `ChatAmulet.with_preference`."""
        bound: Any = self.bound
        pinned = bound.with_preference(preference, **settings)
        dropped = {name: value for name, value in self.kwargs.items() if name not in pinned.pinned}
        return type(self)(bound=pinned, kwargs=dropped, config=self.config)
