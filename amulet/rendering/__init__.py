"""Answers with tokens coloured by how much steering raised each: as HTML, and on a terminal."""
