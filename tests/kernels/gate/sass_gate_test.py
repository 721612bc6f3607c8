#!/usr/bin/env python3
"""Every rule of sass_gate.py fires on a kernel that breaks it, and on no other.

STEM and ARCH in the environment: faulty.cu as compiled for that architecture.
"""

import os
import unittest

import sass_gate

ARCH = os.environ["ARCH"]
KERNELS = sass_gate.measure(os.environ["STEM"], ARCH)


def faults(name, budget=None):
    return sass_gate.faults(KERNELS[name], ARCH, budget)


class SassGateTest(unittest.TestCase):

    def assert_only(self, found, *beginnings):
        self.assertEqual(len(found), len(beginnings), found)
        for fault, beginning in zip(found, beginnings):
            self.assertTrue(fault.startswith(beginning), fault)

    def test_a_sound_kernel_has_no_fault(self):
        budget = sass_gate.budget_of(KERNELS["sound"])
        self.assertEqual(faults("sound", budget), [])
        self.assertEqual(budget["opcodes"], {"LDG.128": 1, "STG.128": 1})
        self.assertEqual(KERNELS["sound"]["threads"], 128)

    def test_spills(self):
        self.assertGreater(KERNELS["spills"]["spills"], 0)
        self.assertLessEqual(KERNELS["spills"]["registers"], 64)
        # ptxas counts the spilled registers as stack too.
        self.assert_only(faults("spills"), "spills ", "stack of ")
        # They are also seen in the code itself.
        self.assertIn("STL.", " ".join(KERNELS["spills"]["opcodes"]))

    def test_stack(self):
        self.assert_only(faults("has_stack"), "stack of 256 bytes")
        recorded = sass_gate.budget_of(KERNELS["has_stack"])
        self.assertEqual(faults("has_stack", recorded), [])

    def test_split_stores(self):
        budget = sass_gate.budget_of(KERNELS["sound"])
        budget["registers"] = 255
        budget["instructions"] = 100
        self.assert_only(faults("splits_stores", budget),
                         "STG.128 0, budget at least 1",
                         "STG.32 4, budget at most 0")

    def test_shared_memory_and_occupancy(self):
        kernel = KERNELS["hoards_shared"]
        self.assertEqual(kernel["shared"], 49152)
        budget = sass_gate.budget_of(kernel)
        self.assertEqual(faults("hoards_shared", budget), [])
        budget["shared"] = 32768
        budget["occupancy"] += 1
        self.assert_only(faults("hoards_shared", budget),
                         "shared 49152, budget 32768", "occupancy ")

    def test_registers_and_instructions(self):
        budget = sass_gate.budget_of(KERNELS["sound"])
        budget["registers"] -= 1
        budget["instructions"] = budget["instructions"] * 9 // 10
        self.assert_only(faults("sound", budget), "registers ",
                         "instructions ")

    def test_more_shared_memory_than_a_device_has(self):
        kernel = dict(KERNELS["sound"], shared=256 * 1024, occupancy=0)
        self.assert_only(sass_gate.faults(kernel, ARCH, None),
                         "shared memory of 262144 bytes", "no block fits")

    def test_occupancy_is_the_textbooks(self):
        # 128 threads: 16 blocks fill 2048; 128 registers leave 4 of them, and
        # 24 KiB of shared memory 9.
        self.assertEqual(sass_gate.occupancy("90", 32, 0, 128), 100)
        self.assertEqual(sass_gate.occupancy("90", 128, 0, 128), 25)
        self.assertEqual(sass_gate.occupancy("90", 32, 24 * 1024, 128), 56)
        self.assertEqual(sass_gate.occupancy("120", 32, 0, 128), 100)


if __name__ == "__main__":
    unittest.main()
