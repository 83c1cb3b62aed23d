"""The fixed-contract diagnostic (arXiv 2605.08234): swap one slot of a contract, predict the sign, say why it failed.

study       what is compared: a sweep, and which arms differ from which base in which slot
finding     what was measured on one sample under one arm, beside its record
cells       scores by (task, model, budget), the unit of all statistics on signs
"""
