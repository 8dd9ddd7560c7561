"""Tests of the LangChain integration."""
