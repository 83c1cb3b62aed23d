"""`python -m kvpress` is `kvpress`."""

from kvpress.cli import main

main()
