#!/usr/bin/env python3
"""Computes the published test vectors of space and chunk ids.

An implementation of store/FORMAT.md of its own, sharing nothing with the C++
code, so that a mistake in one of them shows. Standard library only.

  tests/store/id_vectors.py           print the vectors
  tests/store/id_vectors.py FILE      write them (tests/golden/chunk_ids.json)
  tests/store/id_vectors.py --check FILE   exit 1 if FILE says otherwise
"""

import hashlib
import json
import struct
import sys

KINDS = {"salt": 1, "lora": 2, "image": 3, "prompt": 4}


def sha256(tag, *pieces):
    return hashlib.sha256(tag.encode() + b"\0" + b"".join(pieces)).digest()


def text(value):
    raw = value.encode()
    return struct.pack("<H", len(raw)) + raw


def encode_space(s):
    out = b"LSP1" + text(s["model_name"]) + bytes.fromhex(s["weights"])
    for field in ("cache_dtype", "kv_scales", "rope", "engine_layout",
                  "hash_scheme"):
        out += text(s[field])
    out += struct.pack("<IIH", s["block_tokens"], s["chunk_tokens"],
                       len(s["groups"]))
    for g in s["groups"]:
        out += struct.pack("<BBHHIIIHH", g["kind"], g["layout"],
                           g["layer_count"], g["kv_head_count"],
                           g["k_head_bytes"], g["v_head_bytes"],
                           g["window_tokens"], g["interleave_count"],
                           g["joint"])
        out += text(g["layer_digest"])
    return out


def tokens_and_keys(tokens, keys):
    out = struct.pack(f"<I{len(tokens)}I", len(tokens), *tokens)
    ordered = sorted((k["offset"], KINDS[k["kind"]], bytes.fromhex(k["value"]))
                     for k in keys)
    out += struct.pack("<I", len(ordered))
    for offset, kind, value in ordered:
        out += struct.pack("<BII", kind, offset, len(value)) + value
    return out


def chunk_id(space, parent, tokens, keys):
    link = b"\0" if parent is None else b"\1" + parent
    return sha256("larder.chunk.1", space, link, tokens_and_keys(tokens, keys))


def prompt_ids(space, tokens, chunk_tokens, block_tokens, keys):
    ids, begin, tail = [], 0, 0
    while begin < len(tokens):
        size = min(chunk_tokens, len(tokens) - begin)
        if size < chunk_tokens:
            size -= size % block_tokens if block_tokens else size
            tail = size
        if size == 0:
            break
        inside = [k for k in keys if begin <= k["offset"] < begin + size]
        ids.append(chunk_id(space, ids[-1] if ids else None,
                            tokens[begin:begin + size], inside))
        if tail:
            break
        begin += size
    return ids, tail


def main():
    dense = {
        "model_name": "example-8b",
        "weights": hashlib.sha256(b"weights of example-8b").hexdigest(),
        "cache_dtype": "bf16", "kv_scales": "none",
        "rope": "neox theta=500000 dim=128", "engine_layout": "vllm-0.11",
        "hash_scheme": "larder", "block_tokens": 16, "chunk_tokens": 256,
        "groups": [{
            "kind": 1, "layout": 1, "layer_count": 32, "kv_head_count": 8,
            "k_head_bytes": 256, "v_head_bytes": 256, "window_tokens": 0,
            "interleave_count": 1, "joint": 0, "layer_digest": "0-31"}],
    }
    hybrid = {
        "model_name": "example-hybrid \u00e9",
        "weights": hashlib.sha256(b"weights of example-hybrid").hexdigest(),
        "cache_dtype": "fp8_e4m3", "kv_scales": "sha256:0123", "rope": "none",
        "engine_layout": "sglang-0.5", "hash_scheme": "vllm:sha256_cbor:seed=0",
        "block_tokens": 64, "chunk_tokens": 512,
        "groups": [
            {"kind": 4, "layout": 2, "layer_count": 61, "kv_head_count": 1,
             "k_head_bytes": 576, "v_head_bytes": 0, "window_tokens": 0,
             "interleave_count": 2, "joint": 7, "layer_digest": "0-60"},
            {"kind": 5, "layout": 2, "layer_count": 61, "kv_head_count": 1,
             "k_head_bytes": 132, "v_head_bytes": 0, "window_tokens": 0,
             "interleave_count": 2, "joint": 7, "layer_digest": "0-60"},
            {"kind": 2, "layout": 3, "layer_count": 4, "kv_head_count": 1,
             "k_head_bytes": 2048, "v_head_bytes": 0, "window_tokens": 4096,
             "interleave_count": 4, "joint": 0, "layer_digest": "61-64"},
            {"kind": 3, "layout": 3, "layer_count": 2, "kv_head_count": 1,
             "k_head_bytes": 1048576, "v_head_bytes": 0, "window_tokens": 0,
             "interleave_count": 1, "joint": 0, "layer_digest": "65-66"}],
    }
    spaces = []
    for name, s in (("dense", dense), ("hybrid", hybrid)):
        encoding = encode_space(s)
        spaces.append({"name": name, "fields": s, "encoding": encoding.hex(),
                       "id": sha256("larder.space.1", encoding).hex()})
    space = bytes.fromhex(spaces[0]["id"])

    salt = {"kind": "salt", "offset": 0, "value": b"tenant a".hex()}
    lora = {"kind": "lora", "offset": 0,
            "value": hashlib.sha256(b"adapter").hexdigest()}
    image = {"kind": "image", "offset": 3,
             "value": hashlib.sha256(b"image").hexdigest()}
    late_image = {"kind": "image", "offset": 300,
                  "value": hashlib.sha256(b"another image").hexdigest()}
    embeds = {"kind": "prompt", "offset": 0,
              "value": hashlib.sha256(b"embeddings").hexdigest()}
    empty = {"kind": "salt", "offset": 0, "value": ""}

    root_tokens = list(range(256))
    root = chunk_id(space, None, root_tokens, [])
    child_tokens = [(7 * i + 1) & 0xffffffff for i in range(256)]
    chunks = []
    for name, parent, tokens, keys in (
            ("root", None, root_tokens, []),
            ("child", root, child_tokens, []),
            ("tail of 48 tokens", root, child_tokens[:48], []),
            ("no tokens", None, [], []),
            ("zero parent is not no parent", bytes(32), root_tokens, []),
            ("greatest token id", None, [0xffffffff], []),
            ("salt", None, root_tokens, [salt]),
            ("empty salt is not no salt", None, root_tokens, [empty]),
            ("lora", None, root_tokens, [lora]),
            ("image", None, root_tokens, [image]),
            ("prompt embeddings", None, root_tokens, [embeds]),
            ("all kinds, in an order of no meaning", None, root_tokens,
             [image, embeds, lora, salt]),
            ("the same key twice", None, root_tokens, [salt, salt])):
        chunks.append({
            "name": name, "space": space.hex(),
            "parent": None if parent is None else parent.hex(),
            "tokens": tokens, "keys": keys,
            "id": chunk_id(space, parent, tokens, keys).hex()})

    prompts = []
    long_tokens = [(i * 2654435761) % 128256 for i in range(600)]
    for name, n, chunk, block, keys in (
            ("two chunks and a tail", 600, 256, 16, []),
            ("no tail wanted", 600, 256, 0, []),
            ("shorter than a block", 15, 256, 16, [salt]),
            ("a tail alone", 100, 256, 16, [salt]),
            ("keys land in their chunks", 600, 256, 16,
             [late_image, image, salt, lora]),
            ("a key past the last id is no part of any", 600, 256, 16,
             [{"kind": "image", "offset": 595, "value": "00"}])):
        ids, tail = prompt_ids(space, long_tokens[:n], chunk, block, keys)
        prompts.append({
            "name": name, "space": space.hex(), "tokens": long_tokens[:n],
            "chunk_tokens": chunk, "block_tokens": block, "keys": keys,
            "ids": [i.hex() for i in ids], "tail_tokens": tail})

    engine_hashes = []
    for raw in (b"", bytes(8), hashlib.sha256(b"block").digest()):
        engine_hashes.append({
            "space": space.hex(), "hash": raw.hex(),
            "id": sha256("larder.engine-hash.1", space,
                         struct.pack("<I", len(raw)), raw).hex()})

    root_contents = []
    for tokens, keys in ((root_tokens, []), (root_tokens, [lora, salt])):
        root_contents.append({
            "tokens": tokens, "keys": keys,
            "content": sha256("larder.content.1",
                              tokens_and_keys(tokens, keys)).hex()})

    document = json.dumps({
        "about": "written by tests/store/id_vectors.py; see store/FORMAT.md",
        "spaces": spaces, "chunks": chunks, "prompts": prompts,
        "engine_hashes": engine_hashes, "root_contents": root_contents,
    }, separators=(",", ":")).replace(',{"', ',\n{"') + "\n"
    if len(sys.argv) == 3 and sys.argv[1] == "--check":
        with open(sys.argv[2], encoding="utf-8") as f:
            sys.exit(0 if f.read() == document else "vectors differ")
    elif len(sys.argv) == 2:
        with open(sys.argv[1], "w", encoding="utf-8") as f:
            f.write(document)
    else:
        sys.stdout.write(document)


if __name__ == "__main__":
    main()
