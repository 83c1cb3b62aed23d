"""Evaluation of KV cache compression on RULER, LongBench and NeedleBench, with honest statistics.

    kvpress eval run configs/sweeps/ruler-2k.yaml --out runs/first
    kvpress eval report runs/first

A task yields samples (`sample.py`), `prompt.py` makes token ids of them, the runner decodes them under every arm and
appends a record for each (`records.py`), and statistics and report read nothing but records.
"""
