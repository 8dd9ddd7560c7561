"""Amulet's integrations: `amulet_integrations.langchain`, `amulet_integrations.llama_index`."""
