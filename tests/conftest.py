"""Shared by all tests: no network for model files, and one thread a worker."""

import os

# before transformers is imported anywhere: it reads this once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# two workers share two cores; more threads than cores make small models several times slower
torch.set_num_threads(1)
