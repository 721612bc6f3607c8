"""The workers' half: moves pages between vLLM's paged cache and Larder.

Runs on the model runner's thread. Loads run on threads of the client library;
saves copy their pages into shared memory before the step ends, since vLLM may
overwrite them in the next.
"""

from typing import Any

import larder

from .._engine import Complaints, Connection
from .pages import Pages, PinnedPages, pages_of
from .settings import Geometry
from .steps import LoadOrder, SaveOrder, Step

Opened = tuple[larder.Space, larder.Queue]


class RunningLoad:
    """One request's load; `load` is None if it could not be started."""

    def __init__(self, order: LoadOrder):
        self.order = order
        self.load: larder.Load | None = None
        self.hold: larder.Hold | None = None
        self.landing: list[PinnedPages | None] = []
        # Layers (group, layer) that the step has waited for.
        self.waited: set[tuple[int, int]] = set()

    def failed_blocks(self, geometry: Geometry, usable: int) -> set[int]:
        failed: set[int] = set()
        for group, blocks in zip(geometry.groups, self.order.blocks):
            good = usable * geometry.chunk_tokens // group.block_tokens
            failed.update(block for block in blocks[good:] if block >= 0)
        return failed


class WorkerHalf:
    """One per rank."""

    def __init__(self, geometry: Geometry, rank: int, complain: Complaints):
        self._geometry = geometry
        self._rank = rank % geometry.ranks
        self._complain = complain
        self._pages: list[Pages] = []
        self._layer_of: dict[str, tuple[int, int]] = {}
        # The space, and the queue of loads between steps.
        self._connection: Connection[Opened] = geometry.connection(
            f"vllm worker {self._rank}",
            complain,
            lambda client, space: (space, client.queue()),
        )
        self._between: dict[str, RunningLoad] = {}
        self._within: list[RunningLoad] = []
        self._received: set[str] = set()
        self._sent: set[str] = set()
        self._failed: set[int] = set()
        self._failed_requests: set[str] = set()
        self._step_is_void = False
        self._lineage = 0  # of the worst that was ever delivered

    # ---- Setting up ----

    def register(self, kv_caches: dict[str, Any]) -> None:
        try:
            self._pages = [
                pages_of(
                    [kv_caches[name] for name in group.layer_names],
                    group,
                    *group.share(self._rank, self._geometry.ranks),
                )
                for group in self._geometry.groups
            ]
        except (KeyError, ValueError) as error:
            self._pages = []
            self._complain("cannot keep this cache", error)
            return
        for group in self._geometry.groups:
            for layer, name in enumerate(group.layer_names):
                self._layer_of[name] = (group.index, layer)
        self._connection.wait(self._geometry.settings.lookup_deadline)

    # ---- Loading ----

    def start_loads(self, step: Step) -> None:
        for order in step.loads:
            running = RunningLoad(order)
            try:
                self._start(running)
            except Exception as error:  # noqa: BLE001
                self._complain("cannot load", error)
                self._fail(running)
                continue
            if order.between_steps:
                self._between[order.request_id] = running
            else:
                self._within.append(running)

    def _start(self, running: RunningLoad) -> None:
        if not self._pages or (opened := self._connection.space()) is None:
            raise larder.Unavailable("not connected")
        space, queue = opened
        order, settings = running.order, self._geometry.settings
        ids = larder.Ids(order.held_ids)
        running.hold = space.attach(order.hold_token, ids)
        views = []
        for pages, blocks in zip(self._pages, order.blocks):
            view, landing = pages.to_load(blocks)
            views.append(view)
            running.landing.append(landing)
        running.load = space.start_load(
            ids[order.first : order.first + order.count],
            views,
            hold=running.hold,
            hold_first=order.first,
            threads=settings.load_threads,
            layerwise=not order.between_steps,
            queue=queue if order.between_steps else None,
            user_data=order.request_id,
            lineage=settings.worst_lineage,
            deadline=settings.load_deadline,
        )

    def _fail(self, running: RunningLoad, usable: int = 0) -> None:
        self._lose(running, usable)
        if running.order.between_steps:
            self._received.add(running.order.request_id)
        else:
            self._step_is_void = True

    def _lose(self, running: RunningLoad, usable: int) -> None:
        if len(self._geometry.groups) > 1:
            # vLLM takes no block ids then: they are unique within a group only.
            self._failed_requests.add(running.order.request_id)
        else:
            self._failed |= running.failed_blocks(self._geometry, usable)

    def wait_layer(self, name: str) -> None:
        if name not in self._layer_of:
            return  # uses the pages of a layer before it
        group, layer = self._layer_of[name]
        for running in self._within[:]:
            assert running.load is not None
            if not running.load.wait_layer(layer, self._geometry.settings.load_deadline):
                running.load.cancel()
                loaded = running.load.wait()
                usable = loaded.usable
                self._delivered(loaded.lineage)
                self._within.remove(running)
                self._fail(running, usable)
                self._complain("a layer did not come", running.order.request_id)
                continue
            running.waited.add((group, layer))
            exact = self._geometry.settings.worst_lineage == 0
            if not exact and len(running.waited) == len(self._layer_of):
                self._delivered(running.load.wait().lineage)
            if (landing := running.landing[group]) is not None:
                landing.land(layer)

    def finished(self) -> tuple[set[str] | None, set[str] | None]:
        """(requests whose blocks may go, requests whose load has ended)."""
        opened = self._connection.space()
        while opened is not None and (done := opened[1].poll()):
            for completion in done:
                running = self._between.pop(completion.user_data)
                self._delivered(completion.lineage)
                if completion.good < running.order.count:
                    self._complain(
                        "a load was cut short",
                        larder.reason_name(max(completion.per_key, default=0)),
                    )
                    self._lose(running, completion.good)
                for landing in running.landing:
                    if landing is not None:
                        landing.land()
                self._received.add(running.order.request_id)
        sent, received = self._sent, self._received
        self._sent, self._received = set(), set()
        return sent or None, received or None

    def _delivered(self, lineage: int) -> None:
        """vLLM shares blocks between requests and does not say which: whatever is
        computed from now on may be computed over what has landed."""
        self._lineage = max(self._lineage, lineage)

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def take_failed_requests(self) -> set[str]:
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    # ---- Saving ----

    def save(self, step: Step) -> None:
        for running in self._within:
            if len(running.waited) < len(self._layer_of):
                # Some layer's attention read its pages without asking.
                self._complain("loaded, but not waited for", running.order.request_id)
                assert running.load is not None
                running.load.cancel()
                self._delivered(running.load.wait().lineage)
                self._fail(running)
        self._within.clear()
        # A load that failed within the step: what was computed over it is wrong,
        # whosever it is.
        saves = [] if self._step_is_void else step.saves
        self._step_is_void = False
        for order in saves:
            try:
                self._save(order)
            except larder.Exhausted as error:
                self._complain("no room, not saved", error)
            except Exception as error:  # noqa: BLE001
                self._complain("cannot save", error)
                break
        self._sent.update(step.ended)

    def _save(self, order: SaveOrder) -> None:
        if not self._pages or (opened := self._connection.space()) is None:
            return
        settings = self._geometry.settings
        for group, pages, blocks in zip(
            self._geometry.groups, self._pages, order.blocks
        ):
            if 0 in blocks:  # partly out of a window: others may still have it
                continue
            if not group.saved_by(self._rank):
                continue
            piece, pieces = group.share(self._rank, self._geometry.ranks)
            save = opened[0].save(
                order.id,
                token_count=order.token_count,
                group=group.index,
                interleave_index=piece,
                interleave_count=pieces,
                deadline=settings.save_deadline,
            )
            if save is None:
                continue
            save.gather(pages.to_save(blocks))
            save.commit(
                token_begin=order.token_begin,
                parent=order.parent,
                root_content=order.root_content,
                lineage=self._lineage,
                durable=settings.durable,
                tokens=order.tokens,
                keyed=order.keyed,
            )

    def shutdown(self) -> None:
        for running in [*self._between.values(), *self._within]:
            if running.load is not None:
                running.load.cancel()
        self._between.clear()
        self._within.clear()
        self._connection.close()


class IdleWorker:
    """Where Larder stays out of this worker: what the scheduler's half ordered
    must still come to an end, or its blocks would never be free again."""

    def __init__(self) -> None:
        self._step = Step()

    def register(self, kv_caches: dict[str, Any]) -> None:
        pass

    def start_loads(self, step: Step) -> None:
        self._step = step

    def wait_layer(self, name: str) -> None:
        pass

    def save(self, step: Step) -> None:
        pass

    def finished(self) -> tuple[set[str] | None, set[str] | None]:
        received = {o.request_id for o in self._step.loads if o.between_steps}
        return set(self._step.ended) or None, received or None

    def take_failed_blocks(self) -> set[int]:
        failed = [block for o in self._step.loads for ids in o.blocks for block in ids]
        return {block for block in failed if block >= 0}

    def take_failed_requests(self) -> set[str]:
        return set()

    def shutdown(self) -> None:
        pass
