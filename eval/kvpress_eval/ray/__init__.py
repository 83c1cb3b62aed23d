"""A run on a Ray cluster: the shards of `kvpress eval run --workers`, as Ray tasks on any of its nodes.

    kvpress eval run ruler-2k --ray auto --shards 8 --gpus-per-shard 0.5
    kvpress eval resume runs/first --ray local

`cluster.py` connects and counts what fits, `shard.py` is what a task does, `board.py` is where tasks tell how far they
are, and `driver.py` starts them, and starts them again when their worker is lost.
"""
