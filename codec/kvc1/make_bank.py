#!/usr/bin/env python3
"""Writes the tables of KVC1.

usage: make_bank.py steps > bank_tables.inc
       make_bank.py trellis > trellis_tables.inc
       make_bank.py nested > nested_tables.inc
       make_bank.py exponents > exponent_tables.inc

The files are checked in and are what counts: the tables are part of the format
and never change (FORMAT.md). This program says where the numbers come from.

A table of the bank is the distribution of round(x) where x has a generalized
Gaussian density of shape BETA and standard deviation r, in 4096ths. Its
refinement says, for every magnitude of round(x), how likely each third of that
interval is. A table for numbers along a trellis is the distribution of
round(x + 1/4). A nested table says, for every place (a quarter wide) of a guess near
three neighbouring intervals, how likely each of them is.
Needs nothing but Python.
"""

import math
import sys

SHAPES = (0.7, 1.0, 1.4, 2.0)  # heavy tails .. Gaussian
SCALES = 28
FIRST_SCALE = 0.08  # standard deviations in steps: 0.08 * 3**(k/6)
REACH = 15  # symbols -15..15, then escape
CONTEXTS = 16
TOTAL = 4096


def interval(beta, sigma, lower, upper, pieces=64):
    """The mass of [lower, upper] (same sign), by Simpson's rule."""
    a = sigma * math.sqrt(math.gamma(1 / beta) / math.gamma(3 / beta))
    norm = beta / (2 * a * math.gamma(1 / beta))

    def mass(lo, hi):
        h = (hi - lo) / pieces
        total = 0.0
        for i in range(pieces + 1):
            weight = 1 if i in (0, pieces) else (4 if i % 2 else 2)
            total += weight * math.exp(-((abs(lo + i * h) / a) ** beta))
        return norm * total * h / 3

    # The cusp at 0 and narrow densities want finer pieces near 0.
    cuts = [lower]
    for k in range(-12, 6):
        cut = sigma * 2.0**k
        if lower < cut < upper:
            cuts.append(cut)
    cuts.append(upper)
    return sum(mass(lo, hi) for lo, hi in zip(cuts, cuts[1:]))


def to_counts(masses, total):
    """Integers of this sum, at least 1 each, nearest to the masses in cost."""
    whole = sum(masses)
    counts = [max(1, int(total * m / whole)) for m in masses]
    while sum(counts) != total:
        grow = sum(counts) < total
        best, at = None, None
        for i, (m, c) in enumerate(zip(masses, counts)):
            if not grow and c == 1:
                continue
            gain = m * math.log((c + 1) / c) if grow else -m * math.log(c / (c - 1))
            if best is None or gain > best:
                best, at = gain, i
        counts[at] += 1 if grow else -1
    return counts


def table(beta, sigma):
    half = [interval(beta, sigma, q - 0.5, q + 0.5) for q in range(1, REACH + 1)]
    zero = 2 * interval(beta, sigma, 0.0, 0.5)
    beyond = 2 * interval(beta, sigma, REACH + 0.5, REACH + 0.5 + 30 * sigma)
    masses = half[::-1] + [zero] + half + [beyond]
    counts = to_counts(masses, TOTAL)
    # Exactly symmetric, so that a sign costs one bit: the odd one goes to 0.
    for i in range(REACH):
        low = min(counts[i], counts[2 * REACH - i])
        counts[REACH] += counts[i] + counts[2 * REACH - i] - 2 * low
        counts[i] = counts[2 * REACH - i] = low
    starts, at = [], 0
    for count in counts:
        starts.append(at)
        at += count
    assert at == TOTAL and min(counts) >= 1
    return starts


def trellis_table(beta, sigma):
    def between(lower, upper):
        if lower < 0 < upper:
            return interval(beta, sigma, 0, -lower) + interval(beta, sigma, 0, upper)
        return interval(beta, sigma, *sorted((abs(lower), abs(upper))))

    masses = [between(q - 0.75, q + 0.25) for q in range(-REACH, REACH + 1)]
    far = 30 * sigma
    masses.append(between(REACH + 0.25, REACH + 0.25 + far) +
                  between(REACH + 0.75, REACH + 0.75 + far))
    starts, at = [], 0
    for count in to_counts(masses, TOTAL):
        starts.append(at)
        at += count
    return starts


def refinement(beta, sigma):
    first, second = [], []
    for q in range(CONTEXTS):
        third = 1 / 3
        if q == 0:
            side = interval(beta, sigma, third / 2, 0.5)
            masses = [side, 2 * interval(beta, sigma, 0.0, third / 2), side]
        else:
            edge = q - 0.5
            masses = [
                interval(beta, sigma, edge + i * third, edge + (i + 1) * third)
                for i in range(3)
            ]
        if sum(masses) < 1e-30:  # never seen: far out, the nearest is likeliest
            masses = [0.98, 0.015, 0.005]
        counts = to_counts([m / sum(masses) for m in masses], TOTAL)
        first.append(counts[0])
        second.append(counts[0] + counts[1])
    return first, second


def nested(beta, sigma):
    """Of intervals around -1, 0, 1: by where the guess is, in quarters from -2."""

    def between(lower, upper):
        if lower < 0 < upper:
            return interval(beta, sigma, 0, -lower) + interval(beta, sigma, 0, upper)
        return interval(beta, sigma, *sorted((abs(lower), abs(upper))))

    def masses_at(places):
        sums = [1e-5] * 3
        for place in places:
            for i in range(3):
                sums[i] += between(i - 1.5 - place, i - 0.5 - place) / len(places)
        return sums

    first, second = [], []
    for q in range(CONTEXTS):
        if 0 < q < CONTEXTS - 1:
            places = [-2 + (q + (k + 0.5) / 8) / 4 for k in range(8)]
        else:  # and all that is farther out
            places = [(1 if q else -1) * (1.75 + far) for far in (0.1, 0.2, 0.3, 0.5)]
        masses = masses_at(places)
        counts = to_counts([m / sum(masses) for m in masses], TOTAL)
        first.append(counts[0])
        second.append(counts[0] + counts[1])
    return first, second


# ---- Exponents, for lossless tiles ----

HALVES = 2  # scales to an octave
TOP = 5  # the first symbol is this many octaves above the scale's


def exponents(shape, half):
    """Counts of floor(log2(|x| / scale)) = TOP, TOP - 1, ... TOP - 31."""
    sigma = 2 ** (half / HALVES)
    masses = []
    for depth in range(32):
        low, high = 2.0 ** (TOP - depth), 2.0 ** (TOP - depth + 1)
        if shape == "arc":  # a turning vector of this length, seen from one side
            clip = lambda x: math.asin(min(1.0, x / (sigma * math.sqrt(2))))
            masses.append(2 / math.pi * (clip(high) - clip(low)))
        else:
            masses.append(2 * interval(shape, sigma, low, high))
    return to_counts([m + 1e-6 for m in masses], TOTAL)


def steps_main():
    out = ["// Written by make_bank.py. Part of the format: never changes."]
    for beta in SHAPES:
        for k in range(SCALES):
            sigma = FIRST_SCALE * 3 ** (k / 6)
            first, second = refinement(beta, sigma)
            row = lambda values: "{" + ", ".join(map(str, values)) + "}"
            out.append("{{%s},\n {%s, %s}}," % (
                row(table(beta, sigma)), row(first), row(second)))
    sys.stdout.write("\n".join(out) + "\n")


def trellis_main():
    out = ["// Written by make_bank.py. Part of the format: never changes."]
    for beta in SHAPES:
        for k in range(SCALES):
            starts = trellis_table(beta, FIRST_SCALE * 3 ** (k / 6))
            out.append("{{%s}}," % ", ".join(map(str, starts)))
    sys.stdout.write("\n".join(out) + "\n")


def nested_main():
    out = ["// Written by make_bank.py. Part of the format: never changes."]
    for beta in SHAPES:
        for k in range(SCALES):
            first, second = nested(beta, FIRST_SCALE * 3 ** (k / 6))
            row = lambda values: "{" + ", ".join(map(str, values)) + "}"
            out.append("{%s, %s}," % (row(first), row(second)))
    sys.stdout.write("\n".join(out) + "\n")


def exponents_main():
    out = ["// Written by make_bank.py. Part of the format: never changes."]
    for shape in (0.7, 1.0, 2.0, "arc"):
        for half in range(HALVES):
            out.append("{%s}," % ", ".join(map(str, exponents(shape, half))))
    sys.stdout.write("\n".join(out) + "\n")


def main():
    mains = {"steps": steps_main, "trellis": trellis_main, "nested": nested_main, "exponents": exponents_main}
    if len(sys.argv) != 2 or sys.argv[1] not in mains:
        sys.exit(__doc__.strip())
    mains[sys.argv[1]]()


if __name__ == "__main__":
    main()
