"""LongBench v1 (21 sets), its E splits (13) and v2, from the hub's files or a folder with the same file names.

    kvpress data fetch longbench

Source: THUDM/LongBench 2e00731; Bai et al., arXiv 2308.14508 and 2412.15204. The data's parts keep their own licences.
"""
