"""Plays LMCache's store and prefetch controllers on an L2 adapter."""

import argparse
import hashlib
import json
import select
import time

import numpy as np
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.memory_management import (
    MemoryFormat,
    MemoryObjMetadata,
    TensorMemoryObj,
)
from lmcache.v1.platform import consume_fd

# Longer than any deadline that the tests set: what takes so long, hangs.
PATIENCE = 60.0
UNTOUCHED = 0xEE
LAYOUT = {0: MemoryLayoutDesc(shapes=[], dtypes=[])}


def spec(socket, **params):
    """The adapter's configuration, as on LMCache's command line."""
    return json.dumps(
        {
            "type": "native_plugin",
            "module_path": "larder.lmcache",
            "class_name": "L2Connector",
            "adapter_params": {
                "socket": socket,
                "weights": "test/model@1",
                "cache_dtype": "bf16",
                "parallel": "tp1",
                **params,
            },
        }
    )


def key(number, model="test/model", **fields):
    return ObjectKey(
        chunk_hash=hashlib.sha256(b"chunk %d" % number).digest(),
        model_name=model,
        kv_rank=fields.pop("kv_rank", 0x01000100),
        **fields,
    )


def content(key, size):
    """What is stored under `key`: derived from it, so that anybody can check."""
    seed = hashlib.sha256(repr(key).encode()).digest()[:8]
    return np.random.default_rng(list(seed)).integers(0, 256, size, np.uint8)


def memory(data):
    """A MemoryObj over an array of bytes (no copy)."""
    tensor = torch.from_numpy(data)
    about = MemoryObjMetadata(
        shape=torch.Size([len(data)]),
        dtype=torch.uint8,
        address=0,
        phy_size=len(data),
        fmt=MemoryFormat.KV_2LTD,
        ref_count=1,
    )
    return TensorMemoryObj(raw_data=tensor, metadata=about, parent_allocator=None)


class Controllers:
    """An adapter made by LMCache from `line`; each call waits for its result.

    store() may run in one thread and lookup() and load() in another.
    """

    def __init__(self, line):
        parsed = parse_args_to_l2_adapters_config(
            argparse.Namespace(l2_adapter=[line])
        )
        self.adapter = create_l2_adapter(parsed.adapters[0])

    def store(self, keys, sizes):
        """Stores each key's content; whether LMCache calls that a success."""
        objects = [memory(content(k, n)) for k, n in zip(keys, sizes)]
        task = self.adapter.submit_store_task(keys, objects)
        done = {}

        def popped():
            done.update(self.adapter.pop_completed_store_tasks())
            return done.get(task)

        return self._await(self.adapter.get_store_event_fd(), popped).is_successful()

    def lookup(self, keys):
        task = self.adapter.submit_lookup_and_lock_task(keys, LAYOUT)
        found = self._await(
            self.adapter.get_lookup_and_lock_event_fd(),
            lambda: self.adapter.query_lookup_and_lock_result(task),
        )
        self.adapter.submit_unlock(keys)
        return [found.test(i) for i in range(len(keys))]

    def load(self, keys, sizes):
        """Loads; which keys were, all of whose bytes are proved right, and all
        others' buffers untouched."""
        into = [np.full(n, UNTOUCHED, np.uint8) for n in sizes]
        task = self.adapter.submit_load_task(keys, [memory(data) for data in into])
        found = self._await(
            self.adapter.get_load_event_fd(),
            lambda: self.adapter.query_load_result(task),
        )
        loaded = [found.test(i) for i in range(len(keys))]
        for k, data, hit in zip(keys, into, loaded):
            if hit:
                assert np.array_equal(data, content(k, len(data))), f"wrong bytes: {k}"
            else:
                assert (data == UNTOUCHED).all(), f"touched by a miss: {k}"
        return loaded

    @staticmethod
    def _await(fd, result):
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        until = time.monotonic() + PATIENCE
        while (found := result()) is None:
            assert time.monotonic() < until, "no completion"
            if poller.poll(100):
                consume_fd(fd)
        return found

    def close(self):
        self.adapter.close()
