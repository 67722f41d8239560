"""Programs that stand on the six core modules, the text tools of such programs, and their data."""
