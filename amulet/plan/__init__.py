"""How much memory and time a pair of rows costs on which GPU; `amulet plan`, docs/scaling.md."""
