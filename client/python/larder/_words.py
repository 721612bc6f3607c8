"""The numbers of larder_c.h, by name."""

import enum


class State(enum.IntEnum):
    """Is a chunk there? One byte each in answers."""

    MISS = 0
    READY = 1  # in memory
    DURABLE = 2  # in a slower tier; a hold or prefetch raises it
    PENDING = 3  # a save of it is under way
    UNKNOWN = 4  # cached calls: not known yet
    PEER = 5  # at another node; a hold or prefetch fetches it


# A hold would have it, now or soon.
THERE = (State.READY, State.DURABLE, State.PEER)


class Reason(enum.IntEnum):
    """Why a chunk is not served. One byte each in answers; 0: it is served."""

    NONE = 0
    NEVER_SEEN = 1
    EVICTED = 2
    SPACE_DIFFERS = 3
    INCOMPLETE = 4
    LINEAGE = 5
    DEADLINE = 6
    CORRUPT = 7
    EPOCH = 8
    BUSY = 9
    UNAVAILABLE = 10
    CANCELLED = 11
    NOT_TRIED = 12
    PROFILE = 13
    RECOMPUTE = 14


class Stage(enum.IntEnum):
    """How far a save got."""

    SOURCE_REUSABLE = 1
    VOLATILE = 2
    DURABLE = 3


class Op(enum.IntEnum):
    """What a Completion is of."""

    MATCH = 1
    LOOKUP = 2
    LOAD = 3
    SAVE = 4
    PUT = 5
    GET = 6
    DELETE = 7
    FIND = 8


class GroupKind(enum.IntEnum):
    """What a group's layers keep."""

    FULL_ATTENTION = 1
    SLIDING_WINDOW = 2
    RECURRENT_STATE = 3
    LATENT = 4
    INDEXER = 5


class Layout(enum.IntEnum):
    """How a segment (one layer of one part) is kept."""

    HEAD_MAJOR = 1  # [K|V][head][token][dim]
    TOKEN_MAJOR = 2  # [K|V][token][head * dim]
    OPAQUE = 3  # the engine's own


class KeyKind(enum.IntEnum):
    """What else than tokens a request's KV depends on."""

    SALT = 1
    LORA = 2  # digest of the adapter's weights
    IMAGE = 3  # digest of an item; offset: its first token
    PROMPT = 4  # digest of prompt embeddings


class Lineage(enum.IntEnum):
    """Quality of KV, smaller is better; in requests: the worst that is taken."""

    EXACT = 0
    APPROXIMATE = 200
    ANY = 255
