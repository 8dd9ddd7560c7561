"""Independent answers to compare with."""
