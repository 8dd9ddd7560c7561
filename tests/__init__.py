"""The tests of Amulet and its integrations."""
