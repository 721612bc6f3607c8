"""liblarder.so exports larder_* alone, needs little, and runs on old systems.

usage: check_symbols.py liblarder.so larder_c.h
"""

import re
import subprocess
import sys

# Ubuntu 22.04 and everything after it.
NEWEST_GLIBC = (2, 35)
# Of a thread's own block, of which libraries that are opened at run time share
# some 1.6 KiB.
THREAD_LOCAL_MAX = 512
ALLOWED = {"libcrypto.so.3", "libssl.so.3", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2",
           "libpthread.so.0"}


def main() -> int:
    library, header = sys.argv[1:]
    bad = []
    dump = subprocess.run(["objdump", "-T", library], check=True,
                          capture_output=True, text=True).stdout
    exported = set()
    for line in dump.splitlines():
        fields = line.split()
        if len(fields) < 5 or not re.match(r"[0-9a-f]{16}$", fields[0]):
            continue
        for version in re.findall(r"GLIBC_([0-9.]+)", line):
            if tuple(map(int, version.split("."))) > NEWEST_GLIBC:
                bad.append(f"{fields[-1]} needs GLIBC_{version}")
        if "GLIBCXX_" in line:
            bad.append(f"{fields[-1]} comes from libstdc++.so")
        if "*UND*" not in line and "*ABS*" not in line:
            exported.add(fields[-1])
    declared = set(re.findall(r"\b(larder_[a-z_]+)\(", re.sub(
        r"/\*.*?\*/", "", open(header, encoding="utf-8").read(), flags=re.S)))
    bad += [f"{name} is exported, but not declared"
            for name in sorted(exported - declared)]
    bad += [f"{name} is declared, but not exported"
            for name in sorted(declared - exported)]
    dynamic = subprocess.run(["readelf", "-d", library], check=True,
                             capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    bad += [f"needs {name}" for name in sorted(needed - ALLOWED)]
    headers = subprocess.run(["readelf", "-lW", library], check=True,
                             capture_output=True, text=True).stdout
    for size in re.findall(r"^ +TLS +(?:0x[0-9a-f]+ +){4}(0x[0-9a-f]+)", headers,
                           re.M):
        if int(size, 16) > THREAD_LOCAL_MAX:
            bad.append(f"has {int(size, 16)} bytes of thread-local variables")
    soname = re.findall(r"SONAME.*\[(.*)\]", dynamic)
    if soname != ["liblarder.so.0"]:
        bad.append(f"SONAME is {soname}")
    print("\n".join(bad) or f"{len(exported)} functions, needs "
          + ", ".join(sorted(needed)))
    return 1 if bad else 0


sys.exit(main())
