"""All numerics on the device that is here: every kernel against its plain torch reference in float64.

    python -m kvpress_kernels.check                 a table of op x case -> error, allowed, ok; exit code 1 on failure
    python -m kvpress_kernels.check --op compact --json

One file per op gives its cases; the same cases, smaller, run in the interpreter in the test suite.
"""
