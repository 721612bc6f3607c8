"""The scheduler's half: what of a prompt is there, what is to be saved.

Runs on vLLM's scheduler thread and never waits: the daemon is asked by threads of
the client library, without the interpreter's lock.
"""

import hashlib
import pathlib
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
# What one id takes (larder_c.h).
_KEYS_MAX = 64
_KEY_BYTES_MAX = 256
# Of what ended otherwise, not all KV may be right.
_ENDED_WELL = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


class Tracked:
    """One request, from its arrival to its end."""

    def __init__(self, request: Any, prompt: int):
        self.request = request
        self.prompt_tokens = prompt
        self.keys: list[tuple[int, bytes, int]] = []
        # Of whole chunks, as far as they were needed.
        self.ids: list[bytes] = []
        # Chunks [0, saved) are saved or need not be; `tail` tokens of the next.
        self.saved = 0
        self.saved_tail = 0
        # The question, since when; and its answer once that was looked at.
        self.find: larder.Find | None = None
        self.asked_at = 0.0
        self.found: larder.Found | None = None
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
        self.find = self.found = None

    def still_there(self) -> bool:
        """Whether what was found is still promised."""
        found = self.found
        if found is None or found.hold is None:
            return True
        young = time.monotonic() - self.asked_at < _HOLD_AGE_MAX
        return young and found.hold.valid


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

    def __init__(self, geometry: Geometry, complain: Complaints):
        self._geometry = geometry
        self._complain = complain
        self._connection = geometry.connection(
            "vllm scheduler", complain, lambda client, space: space
        )
        # A daemon that is there is used from the first request on.
        self._connection.wait(geometry.settings.lookup_deadline)
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
            self._ask(tracked)
        return tracked

    def _ask(self, tracked: Tracked) -> None:
        """Leaves no find behind if there is nobody to ask, or nothing to find."""
        request, space = tracked.request, self._connection.space()
        count = request.num_tokens
        if space is None or count <= self._geometry.tail_tokens:
            return
        # The prompt is a list already; a copy of it takes as long as the rest.
        tokens = (
            request.prompt_token_ids
            if count == request.num_prompt_tokens
            else request.all_token_ids[:count]
        )
        tracked.asked_at = time.monotonic()
        try:
            # One token at least is computed, or there would be no logits.
            tracked.find = space.start_find(
                tokens,
                tracked.keys,
                tokens_max=count - 1,
                lineage=self._geometry.settings.worst_lineage,
                deadline=self._geometry.settings.lookup_deadline,
            )
        except Exception as error:  # noqa: BLE001: a miss, whatever it is
            self._complain("cannot ask", error)

    def _answered(self, tracked: Tracked, found: larder.Found) -> None:
        if found.status < 0:
            self._complain("lookup", larder.reason_name(found.reason))
        if found.hold is not None:
            ids = list(found.hold.ids)
            whole = found.tokens // self._geometry.chunk_tokens
            if whole > len(tracked.ids):
                tracked.ids = ids[:whole]

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        tracked = self._requests.get(request.request_id) or self.begin(request)
        if tracked.uncacheable or tracked.gave_up:
            return 0, False
        if not tracked.still_there():
            tracked.forget()
        if tracked.find is None:
            self._ask(tracked)
        if tracked.find is None:
            return 0, False
        if tracked.found is None:
            found = tracked.find.poll()
            if found is None:
                return None, False  # until its deadline at most
            tracked.found = found
            self._answered(tracked, found)
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
                held_ids=list(found.hold.ids),
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
        space, chunk = self._connection.space(), self._geometry.chunk_tokens
        if tracked.uncacheable or space is None:
            return
        tokens = tracked.request.all_token_ids
        while (tracked.saved + 1) * chunk <= end:
            begin = tracked.saved * chunk
            while len(tracked.ids) <= tracked.saved:
                at = len(tracked.ids) * chunk
                tracked.ids.append(self._id_of(space, tracked, at, at + chunk))
            self._order(tracked, tracked.ids[tracked.saved], begin, chunk, blocks)
            tracked.saved += 1
            tracked.saved_tail = 0
        begin, block = tracked.saved * chunk, self._geometry.tail_tokens
        tail = (end - begin) // block * block
        if with_tail and tail > tracked.saved_tail and len(tracked.ids) >= tracked.saved:
            id = self._id_of(space, tracked, begin, begin + tail)
            self._order(tracked, id, begin, tail, blocks)
            tracked.saved_tail = tail

    def _id_of(
        self, space: larder.Space, tracked: Tracked, begin: int, end: int
    ) -> bytes:
        parent = tracked.ids[begin // self._geometry.chunk_tokens - 1] if begin else None
        tokens = tracked.request.all_token_ids[begin:end]
        return space.next_id(parent, tokens, keys_in(tracked.keys, begin, end))

    def _order(
        self, tracked: Tracked, id: bytes, begin: int, count: int, blocks: Any
    ) -> None:
        root_content = None
        if begin == 0:  # lets a later miss of it be explained
            root_content = larder.root_content(
                tracked.request.all_token_ids[:count], keys_in(tracked.keys, 0, count)
            )
        self._saves.append(
            SaveOrder(
                id=id,
                parent=tracked.ids[begin // self._geometry.chunk_tokens - 1]
                if begin
                else None,
                root_content=root_content,
                token_begin=begin,
                token_count=count,
                tokens=list(tracked.request.all_token_ids[begin : begin + count]),
                keyed=bool(keys_in(tracked.keys, 0, begin + count)),
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
        self._connection.close()
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
