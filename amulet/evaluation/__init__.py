"""Compares decoding methods: questions, methods, judges, runs and their report."""
