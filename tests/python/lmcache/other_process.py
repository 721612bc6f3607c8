"""usage: other_process.py SOCKET store|load FIRST COUNT SIZE

Another process than the test's, with an LMCache and an adapter of its own.
"""

import sys

from l2 import Controllers, key, spec

socket, verb, first, count, size = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
keys = [key(first + i) for i in range(count)]
controllers = Controllers(spec(socket))
if verb == "store":
    print("stored" if controllers.store(keys, [size] * count) else "not stored")
else:
    print("loaded", sum(controllers.load(keys, [size] * count)))
controllers.close()
