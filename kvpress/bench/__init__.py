"""Measurements of the runtime: each prints a table for people and returns one JSON-able dict for machines."""
