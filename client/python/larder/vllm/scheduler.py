"""The scheduler's half: what of a prompt is there, what is to be saved.

Runs on vLLM's scheduler thread and never waits: the daemon is asked by a thread
of its own.
"""

import hashlib
import pathlib
import queue
import threading
import time
from collections.abc import Iterable
from typing import Any

import larder
from larder import KeyKind

from .._engine import Complaints, file_digest
from .settings import Geometry
from .steps import BlockIds, LoadOrder, SaveOrder, Step

# A hold lives 30 s unless renewed; what is older is asked for again.
_HOLD_AGE_MAX = 10.0
_RECONNECT_SECONDS = 1.0
# What one id takes (larder_c.h).
_KEYS_MAX = 64
_KEY_BYTES_MAX = 256
# Of what ended otherwise, not all KV may be right.
_ENDED_WELL = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")
_THERE = (larder.State.READY, larder.State.DURABLE)


class Tracked:
    """One request, from its arrival to its end."""

    def __init__(self, request: Any, prompt: int):
        self.request = request
        self.prompt_tokens = prompt
        self.keys: list[tuple[int, bytes, int]] = []
        # Chunks [0, saved) are saved or need not be; `tail` tokens of the next.
        self.ids: list[bytes] = []
        self.saved = 0
        self.saved_tail = 0
        self.root_content: bytes | None = None
        # Asked and no answer yet: found is None.
        self.asked = False
        self.found: Found | None = None
        # Tokens that vLLM had itself when it was last told of more.
        self.computed = 0
        self.blocks: list[list[int]] = []
        # An id cannot be made: its KV depends on what has no digest.
        self.uncacheable = False
        # Blocks that a load was ordered for. One that failed is not tried again.
        self.loading: set[int] = set()
        self.gave_up = False

    def forget(self) -> None:
        """Lets go of what was found; it may be asked for again."""
        if self.found is not None:
            self.found.close()
        self.found = None
        self.asked = False


class Found:
    """The daemon's answer: whole chunks and the longest tail, held."""

    def __init__(self) -> None:
        self.hold: larder.Hold | None = None
        self.ids: list[bytes] = []
        self.tokens = 0
        self._when = time.monotonic()

    def fresh(self) -> bool:
        """Whether what it promises will still be there."""
        if self.tokens == 0:
            return True
        young = time.monotonic() - self._when < _HOLD_AGE_MAX
        return young and self.hold is not None and self.hold.valid

    def close(self) -> None:
        if self.hold is not None:
            self.hold.close()
            self.hold = None


class Finder:
    """Asks the daemon, on its own thread; connects when it is there."""

    def __init__(self, geometry: Geometry, complain: Complaints):
        self._geometry = geometry
        self._complain = complain
        self._questions: queue.SimpleQueue[Tracked | None] = queue.SimpleQueue()
        self._next_try = 0.0
        self.space: larder.Space | None = None
        self._thread = threading.Thread(
            target=self._run, name="larder-finder", daemon=True
        )
        self._thread.start()

    def ask(self, tracked: Tracked) -> None:
        """`tracked.found` will be set, within the lookup deadline or so."""
        tracked.asked = True
        self._questions.put(tracked)

    def stop(self) -> None:
        self._questions.put(None)
        self._thread.join(5)

    def _run(self) -> None:
        self._connect()
        while (tracked := self._questions.get()) is not None:
            found = Found()
            try:
                if self._connect():
                    self._find(tracked, found)
            except Exception as error:  # noqa: BLE001: a miss, whatever it is
                found.close()
                found = Found()
                self._complain("lookup", error)
            tracked.found = found
            del tracked, found  # one that was aborted lets go of its hold

    def _connect(self) -> bool:
        if self.space is not None:
            return True
        if time.monotonic() < self._next_try:
            return False
        try:
            settings = self._geometry.settings
            self.space = self._geometry.open(settings.client("vllm scheduler"))
        except Exception as error:  # noqa: BLE001
            self._complain("cannot open the space", error)
            self._next_try = time.monotonic() + _RECONNECT_SECONDS
            return False
        return True

    def _find(self, tracked: Tracked, found: Found) -> None:
        space, geometry = self.space, self._geometry
        assert space is not None
        tokens = tracked.request.all_token_ids[: tracked.request.num_tokens]
        chunk, block = geometry.chunk_tokens, geometry.tail_tokens
        if not tracked.ids and len(tokens) >= block:
            tracked.ids = list(space.ids(tokens[: len(tokens) // chunk * chunk],
                                         tracked.keys))
            tracked.root_content = larder.root_content(
                tokens[:chunk], keys_in(tracked.keys, 0, chunk)
            )
        # One token at least is computed, or there would be no logits.
        most = (len(tokens) - 1) // block * block
        whole = tracked.ids[: -(-most // chunk)]
        usable = 0
        if whole:
            # With its content a miss is explained, by `larder why-miss` too.
            usable = space.match(
                larder.Ids(whole), root_content=tracked.root_content
            ).usable
        # Where the whole chunks end, a shorter one may go on: the tail of a
        # prompt that was saved before.
        ids = whole[:usable]
        if tails := self._tails(tracked, tokens, usable, most):
            states = space.lookup(larder.Ids(tails))
            there = [i for i, state in enumerate(states) if state in _THERE]
            if there:
                ids = ids + [tails[there[-1]]]
                most = min(most, usable * chunk + (there[-1] + 1) * block)
        if not ids:
            return
        found.hold = space.hold(larder.Ids(ids))
        if found.hold is None:
            return  # evicted meanwhile
        found.ids = ids
        found.tokens = min(most, found.hold.usable * chunk)

    def _tails(
        self, tracked: Tracked, tokens: list[int], usable: int, most: int
    ) -> list[bytes]:
        chunk, block = self._geometry.chunk_tokens, self._geometry.tail_tokens
        begin = usable * chunk
        end = min(most, begin + chunk - block)
        return [
            self.tail_id(tracked, tokens, begin, stop)
            for stop in range(begin + block, end + 1, block)
        ]

    def tail_id(
        self, tracked: Tracked, tokens: list[int], begin: int, end: int
    ) -> bytes:
        assert self.space is not None
        parent = tracked.ids[begin // self._geometry.chunk_tokens - 1] if begin else None
        return self.space.next_id(parent, tokens[begin:end], keys_in(tracked.keys, begin, end))


def keys_in(
    keys: list[tuple[int, bytes, int]], begin: int, end: int
) -> list[tuple[int, bytes, int]]:
    """The request keys that the id of tokens [begin, end) depends on."""
    return [
        (kind, value, offset if kind == KeyKind.IMAGE else 0)
        for kind, value, offset in keys
        if (begin <= offset < end if kind == KeyKind.IMAGE else begin == 0)
    ]


class SchedulerHalf:
    """One per vLLM instance; on the scheduler's thread alone."""

    def __init__(self, geometry: Geometry, finder: Finder, complain: Complaints):
        self._geometry = geometry
        self._finder = finder
        self._complain = complain
        self._requests: dict[str, Tracked] = {}
        self._loads: list[LoadOrder] = []
        self._saves: list[SaveOrder] = []
        self._ended: list[str] = []

    def begin(self, request: Any) -> Tracked:
        tracked = Tracked(request, request.num_prompt_tokens)
        self._requests[request.request_id] = tracked
        try:
            tracked.keys = request_keys(request)
        except Exception as error:  # noqa: BLE001: served without Larder
            self._complain("a request has no digest", error)
            tracked.uncacheable = True
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            tracked.uncacheable = True  # embeddings, perhaps among tokens
        if getattr(request, "resumable", False):
            tracked.uncacheable = True  # its prompt goes on, with other images
        if len(tracked.keys) > _KEYS_MAX:
            tracked.uncacheable = True
        if not tracked.uncacheable:
            self._finder.ask(tracked)
        return tracked

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        tracked = self._requests.get(request.request_id) or self.begin(request)
        if tracked.uncacheable or tracked.gave_up:
            return 0, False
        if tracked.found is not None and not tracked.found.fresh():
            tracked.forget()
        if tracked.found is None:
            if not tracked.asked:
                self._finder.ask(tracked)
            return None, False  # the finder answers within its deadline
        # What is there need not be saved; but a tail may still grow.
        there, chunk = tracked.found.tokens, self._geometry.chunk_tokens
        if there // chunk >= tracked.saved:
            tracked.saved, tracked.saved_tail = there // chunk, there % chunk
        tracked.computed = computed
        more = there - computed
        if more <= 0:
            return 0, False
        return more, self._geometry.settings.load == "async"

    def allocated(self, request: Any, block_ids: BlockIds, external: int) -> None:
        # What was promised must be loaded, or be reported as lost: no way out here.
        tracked = self._requests[request.request_id]
        found, chunk = tracked.found, self._geometry.chunk_tokens
        assert found is not None and found.hold is not None
        begin = tracked.computed
        end = begin + external
        first, last = begin // chunk, -(-end // chunk)
        blocks = tuple(
            self._wanted(group.block_tokens, ids, first * chunk, last * chunk, begin, end)
            for group, ids in zip(self._geometry.groups, block_ids)
        )
        tracked.loading = {block for ids in blocks for block in ids if block >= 0}
        self._loads.append(
            LoadOrder(
                request_id=request.request_id,
                hold_token=found.hold.token,
                held_ids=found.ids,
                first=first,
                count=last - first,
                blocks=blocks,
                between_steps=self._geometry.settings.load == "async",
            )
        )

    @staticmethod
    def _wanted(
        size: int, ids: list[int], first: int, last: int, begin: int, end: int
    ) -> list[int]:
        """Blocks for tokens [first, last) of which [begin, end) are wanted. Block
        0 is vLLM's null block: out of a window."""
        wanted = range(begin // size, end // size)
        return [
            ids[i] if i in wanted and ids[i] != 0 else -1
            for i in range(first // size, last // size)
        ]

    def loads_ended(
        self,
        received: Iterable[str],
        failed_blocks: set[int],
        failed_requests: Iterable[str] = (),
    ) -> None:
        """What the workers said of loads: whole ones, and those that were not."""
        for request_id in failed_requests:
            if (tracked := self._requests.get(request_id)) is not None:
                tracked.gave_up = True
        if failed_blocks:
            for tracked in self._requests.values():
                if tracked.loading & failed_blocks:
                    tracked.gave_up = True
                    tracked.forget()
        for request_id in received:
            if (tracked := self._requests.get(request_id)) is not None:
                tracked.loading.clear()
                tracked.forget()

    def step(self, output: Any) -> Step:
        if self._geometry.settings.save:
            try:
                self._plan_saves(output)
            except Exception as error:  # noqa: BLE001: not saved
                self._complain("cannot plan saves", error)
        step = Step(self._loads, self._saves, self._ended)
        self._loads, self._saves, self._ended = [], [], []
        return step

    def _plan_saves(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            tracked = self._requests.get(new.req_id)
            if tracked is None:
                continue
            tracked.blocks = [list(ids) for ids in new.block_ids]
            self._computed(tracked, new.num_computed_tokens, output, new.req_id)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            fresh = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:  # after a preemption
                tracked.blocks = [list(ids) for ids in fresh or ()]
            elif fresh is not None:
                for have, more in zip(tracked.blocks, fresh):
                    have.extend(more)
            self._computed(tracked, cached.num_computed_tokens[i], output, request_id)

    def _computed(
        self, tracked: Tracked, before: int, output: Any, request_id: str
    ) -> None:
        """After this step tokens [0, end) have KV. Tokens not in all_token_ids
        are guesses of a draft model."""
        if before < tracked.saved * self._geometry.chunk_tokens:
            # Preempted, or not all was loaded: it is computed again.
            tracked.saved = before // self._geometry.chunk_tokens
            tracked.saved_tail = 0
        tokens = tracked.request.all_token_ids
        end = min(before + output.num_scheduled_tokens[request_id], len(tokens))
        prompt_ends = before < tracked.prompt_tokens <= end
        self._save_up_to(tracked, end, tracked.blocks, with_tail=prompt_ends)

    def _save_up_to(
        self, tracked: Tracked, end: int, blocks: Any, with_tail: bool
    ) -> None:
        if tracked.uncacheable or self._finder.space is None:
            return
        space, chunk = self._finder.space, self._geometry.chunk_tokens
        tokens = tracked.request.all_token_ids
        while (tracked.saved + 1) * chunk <= end:
            begin = tracked.saved * chunk
            while len(tracked.ids) <= tracked.saved:
                at = len(tracked.ids) * chunk
                parent = tracked.ids[-1] if tracked.ids else None
                tracked.ids.append(
                    space.next_id(parent, tokens[at : at + chunk],
                                  keys_in(tracked.keys, at, at + chunk))
                )
            self._order(tracked, tracked.ids[tracked.saved], begin, chunk, blocks)
            tracked.saved += 1
            tracked.saved_tail = 0
        begin, block = tracked.saved * chunk, self._geometry.tail_tokens
        tail = (end - begin) // block * block
        if with_tail and tail > tracked.saved_tail and len(tracked.ids) >= tracked.saved:
            id = self._finder.tail_id(tracked, tokens[: begin + tail], begin, begin + tail)
            self._order(tracked, id, begin, tail, blocks)
            tracked.saved_tail = tail

    def _order(
        self, tracked: Tracked, id: bytes, begin: int, count: int, blocks: Any
    ) -> None:
        if begin == 0 and tracked.root_content is None:
            tracked.root_content = larder.root_content(
                tracked.request.all_token_ids[:count], keys_in(tracked.keys, 0, count)
            )
        self._saves.append(
            SaveOrder(
                id=id,
                parent=tracked.ids[begin // self._geometry.chunk_tokens - 1]
                if begin
                else None,
                root_content=tracked.root_content if begin == 0 else None,
                token_begin=begin,
                token_count=count,
                blocks=tuple(
                    list(ids[begin // g.block_tokens : (begin + count) // g.block_tokens])
                    for g, ids in zip(self._geometry.groups, blocks)
                ),
            )
        )

    def finished(self, request: Any, block_ids: BlockIds) -> bool:
        """True: the blocks must stay until the workers have saved from them."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return False
        tracked.forget()
        ended_well = request.status.name in _ENDED_WELL
        if not self._geometry.settings.save or not tracked.blocks or not ended_well:
            return False
        before = len(self._saves)
        try:
            self._save_the_rest(tracked, request, block_ids)
        except Exception as error:  # noqa: BLE001: not saved
            self._complain("cannot plan saves", error)
        if len(self._saves) == before:
            return False
        self._ended.append(request.request_id)
        return True

    def _save_the_rest(
        self, tracked: Tracked, request: Any, block_ids: BlockIds
    ) -> None:
        end = min(request.num_computed_tokens, len(request.all_token_ids) - 1)
        have = min(len(ids) * g.block_tokens
                   for g, ids in zip(self._geometry.groups, block_ids))
        self._save_up_to(tracked, min(end, have), block_ids, with_tail=True)

    def shutdown(self) -> None:
        self._finder.stop()
        for tracked in self._requests.values():
            tracked.forget()


def request_keys(request: Any) -> list[tuple[int, bytes, int]]:
    """What else than tokens the KV of a request depends on."""
    keys: list[tuple[int, bytes, int]] = []
    if request.cache_salt:
        salt = request.cache_salt.encode()
        if len(salt) > _KEY_BYTES_MAX:
            salt = hashlib.sha256(salt).digest()
        keys.append((KeyKind.SALT, salt, 0))
    if request.lora_request is not None:
        keys.append((KeyKind.LORA, _lora_digest(request.lora_request), 0))
    for feature in request.mm_features or ():
        digest = hashlib.sha256(str(feature.identifier).encode()).digest()
        keys.append((KeyKind.IMAGE, digest, feature.mm_position.offset))
    return keys


def _lora_digest(lora: Any) -> bytes:
    """Of the adapter's files, never of its name. OSError if there are none."""
    total = hashlib.sha256(b"larder lora 1")
    files = sorted(
        file
        for file in pathlib.Path(lora.lora_path).iterdir()
        if file.name.startswith("adapter_")
    )
    if not files:
        raise FileNotFoundError(lora.lora_path)
    for file in files:
        total.update(f"{file.name}={file_digest(file)};".encode())
    return total.digest()
