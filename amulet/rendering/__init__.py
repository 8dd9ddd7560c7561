"""Renders answers, with tokens coloured by how much steering raised them: HTML, terminal."""
