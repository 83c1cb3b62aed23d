"""Times of the kernels on the device that is here, next to what it copies and to other attention kernels.

    python -m kvpress_kernels.bench                       all ops; a table, and docs/results/<device>.json
    python -m kvpress_kernels.bench --op ragged_decode --json decode.json

Rules: the copy bandwidth is measured in the same run; a time is the median of replays of a CUDA graph, over inputs of
more than 100 MB, so that nothing is found in the cache; bytes are counted from the shapes; other kernels run on the
same numbers in the same run. An op whose results are wrong gets no time.
"""
