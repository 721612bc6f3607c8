#!/usr/bin/env python3
"""Changes the CUDA kernels in 100 small ways, and sees which changes no test
finds.

  tests/kernels/mutants/mutants.py [--build build/release] [--count 100]

A mutant is one change at one place of kernels/cuda/*.cuh: a barrier or wait
dropped, an index shifted by one, a comparison or mask changed, a constant off by
one, + for - or - for +, && for ||. Which places is decided by a hash of the line,
so that a mutant stays the same while other lines change.

Every mutant is compiled into the executor's tests (only its own object is), and
if those pass into PTX for the interpreter's. Found means that a test fails, or
does not end in time. A mutant that does not compile is replaced by another. One
whose PTX is that of the sources is equivalent: nothing could find it.

Needs a build with nvcc of the simt_*_test and ptx_*_test of all families. Results
are kept in BUILD/mutants.json, so that a run goes on where it was stopped;
--again begins anew. Prints a table of survivors; too long for every change.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
KERNELS = ROOT / "kernels" / "cuda"

# What is changed, and into what: the first group is replaced.
OPERATORS = [
    ("barrier dropped",
     r"((?:__syncthreads|__syncwarp|CpAsyncWait<\w+>|CpAsyncCommit)\([^()]*\));",
     lambda text: ""),
    ("index shifted", r"\w\[([^\[\]]+)\]", lambda text: f"{text} + 1"),
    ("comparison", r" (<=?|>=?|==|!=) ", lambda text: {
        "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=",
        "!=": "=="}[text]),
    ("mask", r" (&|\|) ", lambda text: {"&": "|", "|": "&"}[text]),
    ("mask constant", r"\b(0x[0-9a-f]+)", lambda text: hex(int(text, 16) ^ 1)),
    ("constant", r"(?<![\w.<])(\d+)(?![\w.>])",
     lambda text: str(int(text) + 1)),
    ("plus and minus", r" (\+|-) ", lambda text: {"+": "-", "-": "+"}[text]),
    ("logic", r" (&&|\|\|) ", lambda text: {"&&": "||", "||": "&&"}[text]),
]
# Declarations and what only the compiler reads.
SKIPPED = re.compile(
    r"^\s*(#|//|template|static_assert|using|namespace|struct|LARDER_\w+\()|asm")

Mutant = collections.namedtuple(
    "Mutant", "key file line operator before after text")


def mutants_of(path):
    """Every mutant of one file. Code of injected bugs is left alone."""
    lines = path.read_text(encoding="utf-8").splitlines()
    skipped = []  # of each nested #if: whether its lines are not compiled
    seen = collections.Counter()
    continued = False
    for number, line in enumerate(lines, 1):
        directive = line.strip()
        if directive.startswith("#if"):
            skipped.append(directive.startswith("#ifdef LARDER_INJECT"))
        elif directive.startswith("#else") and skipped:
            skipped[-1] = not skipped[-1]
        elif directive.startswith("#endif") and skipped:
            skipped.pop()
        was_continued, continued = continued, line.endswith("\\")
        if any(skipped) or was_continued or SKIPPED.match(line):
            continue
        code = line.split("//")[0]
        for operator, pattern, change in OPERATORS:
            for match in re.finditer(pattern, code):
                before = match[1]
                after = change(before)
                text = code[:match.start(1)] + after + code[match.end(1):]
                identity = (path.name, operator, line.strip(),
                            text.strip())
                seen[identity] += 1
                key = hashlib.sha256(
                    repr((identity, seen[identity])).encode()).hexdigest()
                yield Mutant(key, path.name, number, operator,
                             line.strip(), text.strip(),
                             "\n".join(lines[:number - 1] + [text] +
                                       lines[number:]) + "\n")


def includes(path, found=None):
    """The files of kernels/cuda that one includes, itself among them."""
    found = set() if found is None else found
    if path.name not in found and path.exists():
        found.add(path.name)
        for name in re.findall(r'#include "kernels/cuda/([^"]+)"',
                               path.read_text(encoding="utf-8")):
            includes(KERNELS / name, found)
    return found


class Family:
    """One .cu file, its tests, and the commands that build them."""

    def __init__(self, name, build):
        self.name = name
        self.build = build
        self.files = includes(KERNELS / f"{name}.cu")
        self.executor = self.commands(f"bin/simt_{name}_test")
        self.ptx = build / "cuda" / f"{name}.80.ptx"
        self.ptx_command = self.commands(str(self.ptx))[-1]

    def commands(self, target):
        said = subprocess.run(
            ["ninja", "-C", self.build, "-t", "commands", target],
            capture_output=True, text=True, check=False)
        if said.returncode != 0:
            sys.exit(f"{said.stdout}{said.stderr}{target}: build it first")
        return [line for line in said.stdout.splitlines()
                if not line.startswith("ninja: ")]

    def run(self, command, timeout=600):
        """True where it succeeds in time."""
        try:
            return subprocess.run(
                command, cwd=self.build, shell=isinstance(command, str),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                timeout=timeout, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def executor_test(self, folder):
        """The executor's test with the mutant; None if it does not compile."""
        source = f"kernels/cuda/{self.name}.cu"
        compile_line = next(line for line in self.executor
                            if source in line and " -c " in line)
        words = shlex.split(compile_line)
        original = words[words.index("-o") + 1]
        mutated = folder / "mutant.o"
        words[words.index("-o") + 1] = str(mutated)
        for flag in ("-MF", "-MT"):
            if flag in words:
                words[words.index(flag) + 1] = str(folder / "mutant.d")
        compiler = next(n for n, word in enumerate(words) if "clang" in word or
                        "g++" in word)
        words.insert(compiler + 1, f"-I{folder}")
        # Compiled once and run once: optimising takes longer than it saves.
        words = words[compiler:] + ["-O0"]
        if not self.run(words):
            return None
        binary = folder / "test"
        link = self.executor[-1].replace(original, str(mutated))
        link = re.sub(r" -o \S+", f" -o {binary}", link)
        # What cmake does after linking is to list the tests.
        link = link.split(" && ")[1] if link.startswith(":") else link
        if not self.run(link):
            sys.exit(f"does not link: {link}")
        return binary

    def mutated_ptx(self, folder):
        output = folder / "mutant.ptx"
        # Beside it cmake changes folders and looks after dependencies.
        command = next(part for part in self.ptx_command.split(" && ")
                       if " --ptx " in part)
        command = command.replace(str(self.ptx), str(output))
        command = command.replace(f"-I{ROOT}", f"-I{folder} -I{ROOT}")
        return output if self.run(command) else None


def code_of(ptx):
    """PTX without comments."""
    return [line for line in ptx.read_text(encoding="utf-8").splitlines()
            if "//" not in line]


def judge(mutant, families, timeout):
    """What found it: 'executor', 'interpreter', 'equivalent', 'survivor'; or
    'invalid' where it does not compile."""
    equivalent = True
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        overlay = folder / "kernels" / "cuda"
        overlay.mkdir(parents=True)
        (overlay / mutant.file).write_text(mutant.text, encoding="utf-8")
        touched = [family for family in families
                   if mutant.file in family.files]
        for family in touched:
            binary = family.executor_test(folder)
            if binary is None:
                return "invalid"
            if not family.run([str(binary), "--gtest_fail_fast"], timeout):
                return "executor"
        for family in touched:
            ptx = family.mutated_ptx(folder)
            if ptx is None:
                return "invalid"
            if code_of(ptx) == code_of(family.ptx):
                continue
            equivalent = False
            test = family.build / "bin" / f"ptx_{family.name}_test"
            if not family.run(f"LARDER_PTX={ptx} {test} --gtest_fail_fast",
                              timeout):
                return "interpreter"
    return "equivalent" if equivalent else "survivor"


def control(family):
    """Seconds that the family's slower test takes without a change; ends the
    program if one does not pass, since then every mutant would be found."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        binary = family.executor_test(folder)
        test = family.build / "bin" / f"ptx_{family.name}_test"
        seconds = []
        for command in ([str(binary)],
                        f"LARDER_PTX={family.ptx} {test}"):
            begin = time.monotonic()
            if binary is None or not family.run(command):
                sys.exit(f"{family.name}: fails without a mutant: {command}")
            seconds.append(time.monotonic() - begin)
        return max(seconds)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--build", default="build/release")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--timeout", type=int, default=60,
                        help="seconds that a test may take; never less than "
                             "ten times what it takes without a mutant")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    build = pathlib.Path(options.build).resolve()
    results_path = build / "mutants.json"
    results = {}
    if results_path.exists() and not options.again:
        results = json.loads(results_path.read_text(encoding="utf-8"))
    families = [Family(path.stem, build) for path in sorted(KERNELS.glob("*.cu"))
                if (build / "bin" / f"simt_{path.stem}_test").exists()]
    for family in families:
        seconds = control(family)
        print(f"{family.name}: {seconds:.1f} s without a mutant", flush=True)
        options.timeout = max(options.timeout, 10 * seconds)
    covered = set().union(*(family.files for family in families))
    candidates = [mutant for path in sorted(KERNELS.glob("*.cuh"))
                  if path.name in covered for mutant in mutants_of(path)]
    candidates.sort(key=lambda mutant: mutant.key)
    print(f"{len(candidates)} places in {len(covered)} files of families "
          f"{', '.join(family.name for family in families)}", flush=True)
    judged = []
    for mutant in candidates:
        if len(judged) == options.count:
            break
        if mutant.key not in results:
            results[mutant.key] = judge(mutant, families, options.timeout)
            results_path.write_text(json.dumps(results), encoding="utf-8")
        if results[mutant.key] != "invalid":
            judged.append(mutant)
            print(f"{len(judged):3} {results[mutant.key]:11} {mutant.file}:"
                  f"{mutant.line} {mutant.operator}: {mutant.after}",
                  flush=True)
    counts = collections.Counter(results[mutant.key] for mutant in judged)
    print(f"\n{len(judged)} mutants: {counts['executor']} found by the executor, "
          f"{counts['interpreter']} by the PTX interpreter alone, "
          f"{counts['equivalent']} equivalent, {counts['survivor']} survive\n")
    print("| place | change | before | after |\n|---|---|---|---|")
    for mutant in judged:
        if results[mutant.key] in ("survivor", "equivalent"):
            same = ", same PTX" * (results[mutant.key] == "equivalent")
            before, after = (text.replace("|", "\\|")
                             for text in (mutant.before, mutant.after))
            print(f"| {mutant.file}:{mutant.line} | {mutant.operator}{same} | "
                  f"`{before}` | `{after}` |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
