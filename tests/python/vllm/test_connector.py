"""LarderConnector under vLLM's own scheduler: what one instance saved, another
reads, and every byte read is the right one."""

import dataclasses
import os
import pathlib
import sys

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, UniformTypeKVCacheSpecs

import larder

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import checkpoint  # noqa: E402

import tiny  # noqa: E402
from engine import BLOCK, Engine  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[3]
DEPS = pathlib.Path(os.environ.get("LARDER_DEPS_DIR") or ROOT / ".deps")
CHUNK = 64


def prompt(seed, count):
    return [(seed * 7919 + i * 104729) % 40000 + 1000 for i in range(count)]


@pytest.fixture(scope="module")
def model():
    return checkpoint.ensure(DEPS)


@pytest.fixture
def engine(shared_daemon, model, request):
    made = []

    def make(**options):
        # Every test has weights of its own, and so a space of its own.
        options.setdefault("seed_of_weights", request.node.nodeid)
        socket = options.pop("socket", shared_daemon.socket)
        kind = options.pop("kind", Engine)
        made.append(kind(options.pop("of", model), socket, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


SHAPES = [
    {},
    {"load": "layerwise"},
    {"window": 40},
    {"window": 40, "load": "layerwise"},
    {"ranks": 2},
    {"ranks": 2, "latent": True},
    {"budget": 24},  # prompts come in many small pieces
    {"blocks": 24},  # requests preempt each other
    {"blocks": 30, "load": "layerwise"},
    {"blocks": 40, "window": 40},
    {"ranks": 2, "window": 40, "budget": 24},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_one_saved_another_reads(engine, shape):
    prompts = [prompt(i, n) for i, n in enumerate((200, 64, 15, 129, 333))]
    prompts.append(prompts[0][:150] + prompt(9, 60))
    first = engine(**shape)
    for i, tokens in enumerate(prompts):
        first.add(f"r{i}", tokens, tokens=6)
        first.run()
    second = engine(**shape)
    for i, tokens in enumerate(prompts):
        second.add(f"r{i}", tokens, tokens=6)
    second.run()
    assert second.outputs == first.outputs
    if "blocks" not in shape:
        # Whole blocks of the prompt, but one token at least is computed.
        assert second.external["r0"] == 192
        assert second.external["r2"] == 0
        assert second.external["r4"] == 320
    assert not second.lost_blocks


def test_latents_are_the_same_on_all_ranks_and_saved_once(engine, make_daemon):
    daemon = make_daemon()
    saved = []
    for latent in (False, True):
        with larder.Client(daemon.socket) as client:
            before = client.usage()["commits"]
            one = engine(socket=daemon.socket, ranks=2, latent=latent)
            one.add("r", prompt(1, 200))
            one.run()
            saved.append(client.usage()["commits"] - before)
    assert saved[0] == 2 * saved[1] > 0


def test_what_was_generated_is_found_by_the_next_turn(engine):
    first = engine()
    first.add("turn1", prompt(1, 100), tokens=50)
    first.run()
    said = prompt(1, 100) + first.outputs["turn1"]
    second = engine()
    second.add("turn2", said + prompt(2, 20), tokens=3)
    second.run()
    assert second.external["turn2"] == (len(said) - 1) // BLOCK * BLOCK


def test_many_at_once_share_prefixes(engine):
    first = engine(blocks=64)
    for i in range(12):
        first.add(f"r{i}", prompt(i % 3, 120) + prompt(50 + i, 40), tokens=20)
    first.run()
    second = engine(blocks=64)
    for i in range(12):
        second.add(f"r{i}", prompt(i % 3, 120) + prompt(50 + i, 40), tokens=20)
    second.run()
    assert second.outputs == first.outputs


def test_an_aborted_request_leaves_nothing_behind(engine):
    from vllm.v1.request import RequestStatus

    first = engine()
    first.add("r", prompt(1, 300))
    first.run()
    second = engine()
    second.add("r", prompt(1, 300))
    second.step()
    second.scheduler.finish_requests(["r"], RequestStatus.FINISHED_ABORTED)
    second.run()
    second.add("again", prompt(1, 300))
    second.run()
    assert second.outputs["again"] == first.outputs["r"]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"load": "layerwise"},
        {"window": 40},
        {"window": 40, "load": "layerwise"},
        {"ranks": 2},
    ],
    ids=str,
)
def test_chunks_lost_between_lookup_and_load_are_computed(
    engine, make_daemon, shape, monkeypatch
):
    from larder.vllm import worker

    daemon = make_daemon()
    first = engine(socket=daemon.socket, **shape)
    first.add("r", prompt(1, 300))
    first.run()
    second = engine(socket=daemon.socket, **shape)
    start = worker.WorkerHalf._start

    def lose(half, running):
        # What the scheduler held is dropped by force before the workers ask.
        running.order.hold_token ^= 1
        start(half, running)

    monkeypatch.setattr(worker.WorkerHalf, "_start", lose)
    second.add("r", prompt(1, 300))
    second.run()
    assert second.outputs == first.outputs
    # vLLM ends when it is told of blocks of one group among several.
    assert second.lost_requests if "window" in shape else second.lost_blocks
    monkeypatch.undo()
    third = engine(socket=daemon.socket, **shape)
    third.add("r", prompt(1, 300))
    third.run()
    assert third.outputs == first.outputs and third.external["r"] == 288


@pytest.mark.parametrize("shape", [{}, {"load": "layerwise"}], ids=str)
def test_a_daemon_that_dies_and_comes_back(engine, make_daemon, shape):
    daemon = make_daemon()
    one = engine(socket=daemon.socket, **shape)
    one.add("a", prompt(1, 300))
    one.run()
    for round in range(3):
        one.add(f"b{round}", prompt(20 + round, 300))
        one.step()
        daemon.kill()
        one.run()
        one.add(f"c{round}", prompt(40 + round, 200))
        one.run()  # without a daemon
        daemon.start()
        for again in range(500):
            name = f"d{round}.{again}"
            one.add(name, prompt(1000 * round + again + 100, 80))
            one.run()
            other = engine(socket=daemon.socket, **shape)
            other.add(name, prompt(1000 * round + again + 100, 80))
            other.run()
            if other.external[name] == 64:
                break
        else:
            raise AssertionError("it never saved again")


def test_nobody_there_at_the_start(engine, make_daemon, tmp_path):
    daemon = make_daemon()
    daemon.end()
    one = engine(socket=daemon.socket)
    one.add("a", prompt(1, 300))
    one.run()
    assert one.external["a"] == 0
    daemon.start()
    for again in range(500):
        one.add(f"b{again}", prompt(again, 80))
        one.run()
        other = engine(socket=daemon.socket)
        other.add("c", prompt(again, 80))
        other.run()
        if other.external["c"] == 64:
            return
    raise AssertionError("it never connected")


def test_salts_and_adapters_are_kept_apart(engine, tmp_path):
    from vllm.lora.request import LoRARequest

    def adapter(name, weights):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.bin").write_text(weights)
        return LoRARequest(lora_name="same name", lora_int_id=1, lora_path=str(folder))

    kinds = {
        "plain": {},
        "salt": {"cache_salt": "same name"},
        "long salt": {"cache_salt": "x" * 5000},
        "lora": {"lora_request": adapter("one", "weights 1")},
        "lora2": {"lora_request": adapter("two", "weights 2")},
    }
    first = engine()
    for name, more in kinds.items():
        first.scheduler.reset_prefix_cache()
        first.add(name, prompt(1, 200), **more)
        first.run()
        assert first.external[name] == 0, name
    second = engine()
    for name, more in kinds.items():
        second.scheduler.reset_prefix_cache()
        second.add(name, prompt(1, 200), **more)
        second.run()
        assert second.external[name] == 192, name
    assert second.outputs == first.outputs
    # An adapter that cannot be read has no digest: neither looked up nor saved.
    gone = LoRARequest(lora_name="gone", lora_int_id=2, lora_path=str(tmp_path / "no"))
    request = second.request("gone", prompt(1, 10), lora_request=gone)
    assert second.scheduler.connector._scheduler.begin(request).uncacheable


def test_embeddings_and_sessions_are_served_without(engine):
    """Their tokens do not say what their KV depends on."""
    tokens = prompt(1, 200)
    one = engine()
    begin = one.scheduler.connector._scheduler.begin
    some = [i < 100 for i in range(len(tokens))]
    for name, more in {
        "mixed": {"prompt_embeds": torch.ones(200, 4), "prompt_is_token_ids": some},
        "session": {"resumable": True},
    }.items():
        assert begin(one.request(name, tokens, **more)).uncacheable, name
    assert begin(one.request("embeds", None, prompt_embeds=torch.ones(200, 4))).uncacheable
    for seed in (1.0, 2.0):
        for which in (one, engine()):
            name = f"mixed {seed} {id(which)}"
            embeds = torch.full((200, 4), seed)
            which.add(name, tokens, prompt_embeds=embeds, prompt_is_token_ids=some)
            which.run()
            assert which.external[name] == 0


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return tiny.llava(tmp_path_factory.mktemp("tiny"))


def picture(name: str, offset: int, length: int) -> MultiModalFeatureSpec:
    where = PlaceholderRange(offset=offset, length=length)
    return MultiModalFeatureSpec(None, "image", name, where, mm_hash=name)


def pictured(count: int, *pictures: MultiModalFeatureSpec) -> list[int]:
    """A prompt with the image token where pictures are, as vLLM makes it."""
    tokens = tiny.prompt(7, count)
    for one in pictures:
        begin, length = one.mm_position.offset, one.mm_position.length
        tokens[begin : begin + length] = [tiny.IMAGE_TOKEN] * length
    return tokens


# Of a saved prompt of so many tokens with these pictures: how much of it others find.
PICTURES = {
    "across a border": (200, [("x", 40, 50)], {
        (("x", 40, 50),): 192,
        (("y", 40, 50),): 0,
    }),
    "in the second chunk": (200, [("x", 70, 30)], {
        (("x", 70, 30),): 192,
        (("y", 70, 30),): 64,
    }),
    "from the border": (200, [("x", 64, 64)], {
        (("x", 64, 64),): 192,
        (("y", 64, 64),): 64,
    }),
    "two": (300, [("x", 10, 20), ("y", 130, 64)], {
        (("x", 10, 20), ("y", 130, 64)): 288,
        (("x", 10, 20), ("z", 130, 64)): 128,
        (("z", 10, 20), ("y", 130, 64)): 0,
        (("y", 10, 20), ("x", 130, 64)): 0,
    }),
    "side by side": (200, [("x", 10, 20), ("y", 30, 20)], {
        (("x", 10, 20), ("y", 30, 20)): 192,
        (("y", 10, 20), ("x", 30, 20)): 0,
        (("x", 10, 40),): 0,
        (("x", 10, 10), ("y", 20, 30)): 0,
    }),
    "in the tail": (110, [("x", 66, 20)], {
        (("x", 66, 20),): 96,
        (("y", 66, 20),): 64,
    }),
    "behind the tail": (110, [("x", 98, 8)], {
        (("x", 98, 8),): 96,
        (("y", 98, 8),): 96,
    }),
    "across all": (250, [("x", 5, 64), ("x", 69, 64), ("y", 133, 64)], {
        (("x", 5, 64), ("x", 69, 64), ("y", 133, 64)): 240,
        (("x", 5, 64), ("y", 69, 64), ("y", 133, 64)): 64,
        (("x", 5, 64), ("x", 69, 64), ("x", 133, 64)): 128,
    }),
}


@pytest.mark.parametrize("case", PICTURES)
def test_only_the_same_pictures_match(engine, seeing, case):
    """Real requests with vLLM's features; every byte read is checked against the
    tokens and the pictures before it."""
    count, saved, others = PICTURES[case]

    def ask(which, name, pictures):
        features = [picture(*one) for one in pictures]
        which.scheduler.reset_prefix_cache()
        which.add(name, pictured(count, *features), mm_features=features)
        which.run()
        return which.external[name]

    first = engine(of=seeing, implementation="transformers")
    assert ask(first, "saves", saved) == 0
    for i, (pictures, found) in enumerate(others.items()):
        # Only loads: what one of these saved, the next would find.
        other = engine(of=seeing, implementation="transformers", save=False)
        assert ask(other, f"asks {i}", pictures) == found, pictures
        assert not other.lost_blocks


class UnevenEngine(Engine):
    """Layers with pages of their own: the workers see it, the scheduler does not."""

    def _worker(self, cache):
        uneven = [
            KVCacheGroupSpec(
                group.layer_names,
                UniformTypeKVCacheSpecs(
                    block_size=BLOCK,
                    kv_cache_specs={n: group.kv_cache_spec for n in group.layer_names},
                ),
            )
            for group in cache.kv_cache_groups
        ]
        return super()._worker(dataclasses.replace(cache, kv_cache_groups=uneven))


def test_workers_that_stay_out_hold_no_blocks(engine):
    # Something that the scheduler's half finds, and orders of them.
    first = engine()
    first.add("r", prompt(1, 300))
    first.run()
    one = engine(kind=UnevenEngine)
    pool = one.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    for name in ("r", "s"):
        one.add(name, prompt(1, 300))
        one.run()
    assert one.outputs["r"] == one.outputs["s"] == first.outputs["r"]
    assert pool.get_num_free_blocks() == free


class HurriedEngine(Engine):
    """Its last layer's attention does not ask whether its pages have come."""

    def _forward(self, rank, worker, output, tables):
        wait, last = worker.wait_for_layer_load, self.groups[-1].layer_names[-1]
        worker.wait_for_layer_load = lambda name: None if name == last else wait(name)
        super()._forward(rank, worker, output, tables)

    def _check(self, rank, request_id, name, pages, blocks, position):
        if name != self.groups[-1].layer_names[-1]:
            super()._check(rank, request_id, name, pages, blocks, position)


def test_layers_that_nobody_waits_for_are_computed(engine):
    first = engine()
    first.add("r", prompt(1, 300))
    first.run()
    second = engine(kind=HurriedEngine, load="layerwise")
    second.add("r", prompt(1, 300))
    second.run()
    assert second.outputs == first.outputs and second.lost_blocks


def test_images_enter_the_chunks_that_hold_them(engine):
    """The ids themselves, whole and link by link."""
    from larder.vllm.scheduler import keys_in, request_keys

    one = engine()

    def request(*images, salt=None):
        features = [picture(name, offset, 8) for name, offset in images]
        return one.request("i", [9] * 20, cache_salt=salt, mm_features=features)

    one.add("r", prompt(1, 20))
    one.run()
    space = one.scheduler.connector._scheduler._connection.space()
    tokens = prompt(1, 4 * CHUNK)

    def ids(*images, salt=None):
        keys = request_keys(request(*images, salt=salt))
        whole = list(space.ids(tokens, keys))
        # The same, link by link, as chunks are completed.
        chain = []
        for at in range(0, len(tokens), CHUNK):
            part = keys_in(keys, at, at + CHUNK)
            parent = chain[-1] if chain else None
            chain.append(space.next_id(parent, tokens[at : at + CHUNK], part))
        assert chain == whole
        return whole

    plain, x, y = ids(), ids(("x", 70)), ids(("y", 70))
    assert plain[0] == x[0] == y[0]
    assert len({plain[1], x[1], y[1], ids(("x", 80))[1]}) == 4
    assert len({plain[3], x[3], y[3]}) == 3
    assert ids(salt="s")[0] != plain[0] and ids(("x", 0))[0] != plain[0]
    assert ids(("x", 70), ("y", 200))[:3] == x[:3]
    # More than an id takes: served without Larder.
    many = request(*[("x", i) for i in range(100)])
    assert one.scheduler.connector._scheduler.begin(many).uncacheable


def test_other_weights_and_other_ranks_miss(engine):
    first = engine()
    first.add("r", prompt(1, 300))
    first.run()
    for change in ({"seed_of_weights": "others"}, {"ranks": 2}, {"window": 40}):
        other = engine(**change)
        other.add("r", prompt(1, 300))
        other.run()
        assert other.external["r"] == 0
        assert other.outputs == first.outputs


def test_mistakes_are_refused_at_the_start(engine):
    with pytest.raises(ValueError, match="does not know sokcet"):
        engine(sokcet="x")
    with pytest.raises(ValueError, match="layerwise"):
        engine(load="sometimes")


def test_device_memory_goes_through_a_copy(engine, monkeypatch):
    """The way of GPUs, with host tensors: what is checked is the copying."""
    from larder.vllm import pages

    monkeypatch.setattr(pages, "HostPages", pages.DevicePages)
    for shape in ({"window": 40}, {"load": "layerwise"}):
        first = engine(seed_of_weights=str(shape), **shape)
        first.add("r", prompt(1, 300))
        first.run()
        second = engine(seed_of_weights=str(shape), **shape)
        second.add("r", prompt(1, 300))
        second.run()
        assert second.external["r"] == 288
        assert second.outputs == first.outputs
