"""The command line. ``growkit --help`` and ``validate`` import neither torch nor lightning."""

import os

# Read when torch is loaded: large tensors in pages of 2 MB (where the kernel allows it, as Linux does when asked).
# Filling 4 kB pages one by one takes as long as the copy of a tensor does.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
