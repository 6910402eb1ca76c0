"""Readers of record files, and records from a user's own triples."""
