"""Amulet inside frameworks: `amulet_integrations.langchain`, `amulet_integrations.llama_index`."""
