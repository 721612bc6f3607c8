#!/usr/bin/env python3
"""Compares compiled CUDA kernels with recorded budgets, without a GPU.

For every kernel of an architecture: registers, spills, stack and shared memory
from `ptxas -v`; block size from the PTX; instructions from the cubin's ELF, where
each is 128 bits: the operation in the low 12, the size of a load or store in bits
73 to 75. Neither cuobjdump nor nvdisasm is needed.

  sass_gate.py --arch 90 --folder build/release/cuda --families paged_copy,...
      --budgets tests/kernels/gate/budgets --compiler 13.0 [--record]

Rules without a budget: nothing spills, and no stack but what is recorded.
Recorded: registers, shared memory, instructions (a twentieth more is allowed),
occupancy, 128-bit accesses (no fewer), narrower ones to global memory (no more).
A compiler other than the recorded one makes other code: only the rules without a
budget are checked then, and the output says so.
"""

import argparse
import collections
import json
import os
import re
import struct
import sys

# Low 12 bits of an instruction, of sm_80 to sm_120. What is not here is counted
# as an instruction, and has no name.
OPCODES = {
    0x381: "LDG", 0x981: "LDG", 0x386: "STG", 0x986: "STG",
    0x384: "LDS", 0x984: "LDS", 0x388: "STS", 0x988: "STS",
    0x383: "LDL", 0x983: "LDL", 0x387: "STL", 0x987: "STL",
    0xfae: "LDGSTS", 0xb1d: "BAR",
    0x389: "SHFL", 0x589: "SHFL", 0x989: "SHFL", 0xf89: "SHFL",
    0x806: "VOTE", 0x309: "POPC", 0x308: "MUFU", 0x947: "BRA", 0x94d: "EXIT",
    0x98e: "REDG", 0x3a9: "ATOMG", 0x9a8: "ATOMG", 0x943: "CALL",
    0x944: "CALL", 0x23c: "HMMA", 0x237: "IMMA", 0x83b: "LDSM", 0x918: "NOP",
}
SIZED = ("LDG", "STG", "LDS", "STS", "LDL", "STL")
SIZES = ("8", "8", "16", "16", "32", "64", "128", "?")

# Registers, KiB of shared memory, threads and blocks of a multiprocessor; KiB of
# a block. CUDA C++ Programming Guide, "Compute Capabilities".
Multiprocessor = collections.namedtuple(
    "Multiprocessor", "registers shared_kib threads blocks block_kib")
MULTIPROCESSORS = {
    "80": Multiprocessor(65536, 164, 2048, 32, 163),
    "90": Multiprocessor(65536, 228, 2048, 32, 227),
    "100": Multiprocessor(65536, 228, 2048, 32, 227),
    "120": Multiprocessor(65536, 100, 1536, 24, 99),
}
# What CUDA takes of a block's shared memory for itself.
RESERVED_SHARED = 1024


def sections(elf):
    """Names and contents of the sections of a 64-bit ELF file."""
    table = struct.unpack_from("<Q", elf, 40)[0]
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + size * n)
               for n in range(count)]
    strings = headers[names][4]
    for header in headers:
        start = strings + header[0]
        name = elf[start:elf.index(b"\0", start)].decode()
        # SHT_NOBITS has a size and no bytes.
        data = b"" if header[1] == 8 else elf[header[4]:header[4] + header[5]]
        yield name, data


def opcodes(text):
    """Instructions of a kernel's code, and how many of each name."""
    counts = collections.Counter()
    total = 0
    for low, high in struct.iter_unpack("<QQ", text):
        name = OPCODES.get(low & 0xfff)
        if name == "NOP":
            continue
        total += 1
        if name in SIZED:
            name += "." + SIZES[high >> 9 & 7]
        if name:
            counts[name] += 1
    return total, dict(sorted(counts.items()))


def occupancy(arch, registers, shared, threads):
    """Percent of a multiprocessor's threads that can be there at once."""
    multiprocessor = MULTIPROCESSORS[arch]
    warps = (threads + 31) // 32
    # A warp's registers come in pieces of 256, shared memory in 128 bytes.
    per_warp = (registers * 32 + 255) // 256 * 256
    per_block = (shared + RESERVED_SHARED + 127) // 128 * 128
    blocks = min(multiprocessor.registers // per_warp // warps,
                 multiprocessor.shared_kib * 1024 // per_block,
                 multiprocessor.threads // (warps * 32),
                 multiprocessor.blocks)
    return blocks * warps * 32 * 100 // multiprocessor.threads


def measure(stem, arch):
    """Every kernel of STEM.cubin, STEM.cubin.txt and STEM.ptx."""
    with open(stem + ".cubin.txt", encoding="utf-8") as file:
        said = file.read()
    with open(stem + ".ptx", encoding="utf-8") as file:
        ptx = file.read()
    with open(stem + ".cubin", "rb") as file:
        elf = file.read()
    threads = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)[^{]*", ptx):
        bounds = re.search(r"\.(?:max|req)ntid\s+([\d, ]+)", match[0])
        product = 1
        for number in (bounds[1] if bounds else "1024").split(","):
            product *= int(number)
        threads[match[1]] = product
    kernels = {}
    for part in said.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, "
                          r"(\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if not frame or not used:
            raise ValueError(f"{stem}.cubin.txt says nothing of {name}")
        kernel = {
            "registers": int(used[1]),
            "spills": int(frame[2]) + int(frame[3]),
            "stack": int(frame[1]),
            "shared": int(shared[1]) if shared else 0,
            "threads": threads[name],
        }
        kernel["occupancy"] = occupancy(
            arch, kernel["registers"], kernel["shared"], kernel["threads"])
        kernels[name] = kernel
    for name, text in sections(elf):
        if name.startswith(".text."):
            kernel = kernels[name[len(".text."):]]
            kernel["instructions"], kernel["opcodes"] = opcodes(text)
    for name, kernel in kernels.items():
        if "opcodes" not in kernel:
            raise ValueError(f"{stem}.cubin has no code of {name}")
    return kernels


def is_narrow_global(opcode):
    return opcode.startswith(("LDG.", "STG.")) and not opcode.endswith("128")


def budget_of(kernel):
    """What is recorded of a measured kernel."""
    budget = {key: kernel[key]
              for key in ("registers", "shared", "occupancy", "instructions")}
    if kernel["stack"]:
        budget["stack"] = kernel["stack"]
    budget["opcodes"] = {
        name: count for name, count in kernel["opcodes"].items()
        if name.endswith(".128") or is_narrow_global(name)}
    return budget


def faults(kernel, arch, budget):
    """What is wrong with a kernel; without a budget, by the other rules only."""
    found = []
    if kernel["spills"]:
        found.append(f"spills {kernel['spills']} bytes of registers")
    allowed = (budget or {}).get("stack", 0)
    if kernel["stack"] > allowed:
        found.append(f"stack of {kernel['stack']} bytes, budget {allowed}")
    limit = MULTIPROCESSORS[arch].block_kib * 1024
    if kernel["shared"] > limit:
        found.append(f"shared memory of {kernel['shared']} bytes, "
                     f"the device has {limit}")
    if kernel["occupancy"] == 0:
        found.append("no block fits a multiprocessor")
    if budget is None:
        return found
    for key in ("registers", "shared"):
        if kernel[key] > budget[key]:
            found.append(f"{key} {kernel[key]}, budget {budget[key]}")
    most = budget["instructions"] * 21 // 20
    if kernel["instructions"] > most:
        found.append(f"instructions {kernel['instructions']}, budget {most}")
    if kernel["occupancy"] < budget["occupancy"]:
        found.append(f"occupancy {kernel['occupancy']} %, "
                     f"budget {budget['occupancy']} %")
    for name in sorted(set(budget["opcodes"]) | set(kernel["opcodes"])):
        count = kernel["opcodes"].get(name, 0)
        recorded = budget["opcodes"].get(name, 0)
        if name.endswith(".128") and count < recorded:
            found.append(f"{name} {count}, budget at least {recorded}")
        if is_narrow_global(name) and count > recorded:
            found.append(f"{name} {count}, budget at most {recorded}")
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", required=True, choices=MULTIPROCESSORS)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--families", required=True)
    parser.add_argument("--budgets", required=True)
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--record", action="store_true",
                        help="write the budgets instead of comparing")
    options = parser.parse_args()
    kernels = {}
    for family in options.families.split(","):
        stem = os.path.join(options.folder, f"{family}.{options.arch}")
        kernels.update(measure(stem, options.arch))
    path = os.path.join(options.budgets, f"sm_{options.arch}.json")
    if options.record:
        document = {"compiler": options.compiler,
                    "kernels": {name: budget_of(kernel)
                                for name, kernel in sorted(kernels.items())}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
    with open(path, encoding="utf-8") as file:
        document = json.load(file)
    comparable = document["compiler"] == options.compiler
    if not comparable:
        print(f"budgets are of nvcc {document['compiler']}, this is "
              f"{options.compiler}: only spills, stack and limits are checked")
    budgets = document["kernels"]
    failed = 0
    for name, kernel in sorted(kernels.items()):
        print(f"{name} [sm_{options.arch}]: "
              f"registers {kernel['registers']}, spills {kernel['spills']}, "
              f"stack {kernel['stack']}, shared {kernel['shared']}, "
              f"instructions {kernel['instructions']}, "
              f"occupancy {kernel['occupancy']} % of {kernel['threads']} threads")
        print("  " + " ".join(f"{opcode}:{count}" for opcode, count
                              in kernel["opcodes"].items()))
        budget = budgets.get(name)
        found = faults(kernel, options.arch, budget if comparable else None)
        if comparable and budget is None:
            found.append("no budget: record it with --record")
        for fault in found:
            print(f"  FAIL {fault}")
        failed += bool(found)
    for name in sorted(set(budgets) - set(kernels)) if comparable else ():
        print(f"{name}: FAIL a budget for no kernel; record again")
        failed += 1
    print(f"{len(kernels)} kernels, {failed} failed")
    # Recording judges nothing, so that it goes on to the other architectures.
    return 1 if failed and not options.record else 0


if __name__ == "__main__":
    sys.exit(main())
