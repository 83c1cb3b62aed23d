"""Plain torch functions: the CPU path for good, and the reference that every GPU kernel is compared with."""
