"""RULER's 13 tasks, generated to a length in the evaluated model's own tokenizer, in three variants.

    kvpress data fetch ruler
    kvpress eval list ruler-2026

Structure, templates and answer prefixes are the published ones (see `variants.py` for what differs between versions).
The official generator draws from one global generator; here every sample has its own, seeded by (seed, task, index), so
that sample i does not depend on how many are asked for. Drawn words and numbers are therefore not the official ones.
"""
