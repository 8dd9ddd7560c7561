"""The room tool_calls."""
