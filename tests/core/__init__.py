"""What lies directly in amulet/, and what concerns several rooms."""
