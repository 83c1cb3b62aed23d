"""Evaluation and diagnostics on top of `kvpress`: tasks, scorers, sweeps and statistics."""
