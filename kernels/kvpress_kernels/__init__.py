"""Attention and cache kernels over plain tensors.

One op a file, its plain torch reference of the same signature in `reference/`. Nothing here knows of models
or contracts: this package imports neither `kvpress` nor `kvpress_eval`.
"""
