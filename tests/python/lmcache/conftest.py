"""LMCache, quiet and without reports to its makers."""

import os

# Read when LMCache is imported, also by the processes that tests start.
os.environ["LMCACHE_TRACK_USAGE"] = "false"
os.environ["LMCACHE_DISABLE_BANNER"] = "1"
os.environ["LMCACHE_LOG_LEVEL"] = "WARNING"
