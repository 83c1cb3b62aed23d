"""The commands `kvpress eval` and `kvpress data`, which `kvpress` finds through its entry points.

Each command imports what it needs when it runs, so that `kvpress --help` answers at once.
"""
