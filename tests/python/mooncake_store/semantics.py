"""What a store answers, call by call, as JSON: run with Mooncake's own store, and
with Larder in its place. `semantics.py [MASTER METADATA]`"""

import ctypes
import json
import sys

from mooncake.store import MooncakeDistributedStore, ReplicateConfig

master, metadata = sys.argv[1:] if len(sys.argv) > 1 else ("ignored:1", "ignored")
store = MooncakeDistributedStore()
answers = {}


def note(name, answer):
    if hasattr(answer, "ptr"):
        answer = {"size": answer.size(), "bytes": bytes(memoryview(answer)).hex()}
    if isinstance(answer, bytes):
        answer = answer.decode("latin-1")
    if isinstance(answer, list):
        answer = [a.decode("latin-1") if isinstance(a, bytes) else a for a in answer]
    answers[name] = answer


note(
    "setup",
    store.setup(
        "127.0.0.1", metadata, 64 << 20, 32 << 20, "tcp", "", master
    ),
)
note("health", store.health_check())
note("put", store.put("a", b"hello"))
note("put again", store.put("a", b"something else"))
note("get", store.get("a"))
note("get_size", store.get_size("a"))
note("is_exist", [store.is_exist("a"), store.is_exist("none")])
note("get none", store.get("none"))
note("get_size none", store.get_size("none"))
note("put empty", store.put("e", b""))
note("get empty", store.get("e"))
note("put no key", store.put("", b"x"))
note("put config", store.put("cfg", b"x", ReplicateConfig()))
note("put view", store.put("view", memoryview(bytearray(b"abc"))))
note("put long key", store.put("k" * 5000, b"v"))
note("get long key", store.get("k" * 5000))
note("put_batch", store.put_batch(["b1", "b2"], [b"1", b"22"]))
note("put_batch uneven", store.put_batch(["b1", "b2"], [b"1"]))
note("put_batch none", store.put_batch([], []))
note("get_batch", store.get_batch(["b1", "none", "b2"]))
note("put_parts", store.put_parts("p", b"ab", b"cd", bytearray(b"ef")))
note("get parts", store.get("p"))
note("put_parts none", store.put_parts("p0"))
note("batch_is_exist", store.batch_is_exist(["a", "none", "p"]))
note("batch_is_exist none", store.batch_is_exist([]))
note("get_buffer", store.get_buffer("a"))
note("get_buffer none", store.get_buffer("none"))
buffers = store.batch_get_buffer(["a", "none"])
note("batch_get_buffer", [b and b.size() for b in buffers])

memory = ctypes.create_string_buffer(b"0123456789", 1000)
at = ctypes.addressof(memory)
note("register_buffer", store.register_buffer(at, 1000))
note("register_buffer again", store.register_buffer(at, 1000))
note("put_from", store.put_from("f", at, 10))
note("get from", store.get("f"))
note("get_into", store.get_into("f", at + 100, 100))
note("landed", memory.raw[100:111])
note("get_into exactly", store.get_into("f", at + 120, 10))
note("get_into too small", store.get_into("f", at + 200, 5))
note("untouched", memory.raw[200:210])
note("get_into none", store.get_into("none", at, 10))
note("batch_put_from", store.batch_put_from(["c1", "f", "c2"], [at, at + 1, at + 2],
                                            [5, 5, 5]))
note("first wins", store.get_batch(["c1", "f", "c2"]))
note("batch_put_from uneven", store.batch_put_from(["d1", "d2"], [at], [5]))
note("batch_get_into", store.batch_get_into(
    ["c1", "none", "c2", "f"], [at + 300, at + 310, at + 320, at + 330], [5, 5, 10, 3]))
note("batch landed", memory.raw[300:345])
note("batch_get_into uneven", store.batch_get_into(["c1", "c2"], [at], [5]))
note("multi put", store.batch_put_from_multi_buffers(
    ["m1", "m2"], [[at, at + 5], [at + 2]], [[3, 4], [6]]))
note("multi kept", store.get_batch(["m1", "m2"]))
note("multi get", store.batch_get_into_multi_buffers(
    ["m1", "none", "m2"], [[at + 400, at + 410], [at + 420], [at + 430]],
    [[3, 4], [5], [6]]))
note("multi landed", memory.raw[400:440])
note("multi too small", store.batch_get_into_multi_buffers(["m1"], [[at + 500]], [[3]]))

note("upsert", [store.upsert("a", b"new"), store.upsert("u", b"fresh")])
note("upserted", store.get_batch(["a", "u"]))
note("upsert_parts", store.upsert_parts("u", b"v", b"w"))
note("upsert_from", store.upsert_from("a", at, 4))
note("upserted more", store.get_batch(["a", "u"]))
note("upsert_batch", store.upsert_batch(["a", "u"], [b"1", b"2"]))
note("batch_upsert_from", store.batch_upsert_from(["a", "n"], [at, at], [1, 2]))
note("upserted last", store.get_batch(["a", "u", "n"]))

note("remove", store.remove("a", True))
note("removed", [store.is_exist("a"), store.get("a")])
note("remove none", store.remove("none"))
note("batch_remove", store.batch_remove(["b1", "none", "p"], True))
note("unregister_buffer", store.unregister_buffer(at))
note("unregister_buffer again", store.unregister_buffer(at))
# cfg, view, the long key, b2, f, c1, c2, m1, m2, u, n
note("remove_all", store.remove_all(True))
note("all removed", store.batch_is_exist(["f", "c1", "u"]))
note("close", store.close())
print(json.dumps(answers))
