"""The built-in demo: a small real model, a real document, and what each cache answers. `kvpress demo` runs it."""
