"""Programs that stand on the six core modules, the text tools of such programs, and their data."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that spin longer starve a busy machine
