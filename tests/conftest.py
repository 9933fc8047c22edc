"""One thread a process: with more of them than cores, tiny operations wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
