"""What the user says in --hicache-storage-backend-extra-config, and what SGLang
says of its model: what the KV depends on beside its tokens and its place."""

import dataclasses
import pathlib
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

from .._engine import file_digest, settings_from, weights_told

# What SGLang itself reads from the same dictionary.
_SGLANG_KEYS = ("backend_name", "module_path", "class_name", "interface_v1")


@dataclasses.dataclass
class Settings:
    """--hicache-storage-backend-extra-config, without SGLang's own keys. Unknown
    ones are refused, with the known ones named."""

    socket: str | None = None
    token: str | None = None
    # Of each question to the daemon: a call asks one for each of its pools, and
    # takes as long again for each that it has to open first.
    deadline_ms: int = 2000
    # SHA-256 of the weights in hex; None: of the files of `model_path`.
    weights: str | None = None
    # None: the one that SGLang was started with.
    model_path: str | None = None
    # None: SGLang's --kv-cache-dtype and the pool's.
    cache_dtype: str | None = None
    # Pages count as written only when they survive power loss.
    durable: bool = False

    @classmethod
    def of(cls, extra: dict[str, Any]) -> "Settings":
        mine = {k: v for k, v in extra.items() if k not in _SGLANG_KEYS}
        made = settings_from(cls, mine, "hicache-storage-backend-extra-config")
        if made.deadline_ms <= 0:
            raise ValueError("deadline_ms must be positive")
        return made


@dataclasses.dataclass
class Model:
    """What the KV depends on beside its tokens and its place in a pool."""

    name: str
    weights: bytes
    # SGLang's arguments that change the KV, as it was given them.
    cache_dtype: str | None
    kv_scales: str
    rope: str
    compute: str

    @classmethod
    def of(cls, config: HiCacheStorageConfig, settings: Settings) -> "Model":
        """Raises ValueError or FileNotFoundError if the weights are not known."""
        arguments = _server_arguments()
        path = (
            settings.model_path
            or getattr(arguments, "model_path", None)
            or config.model_name
        )
        scales = getattr(arguments, "quantization_param_path", None)
        rope = getattr(arguments, "json_model_override_args", None)
        return cls(
            name=config.model_name or str(path),
            weights=weights_told(settings.weights, path),
            cache_dtype=settings.cache_dtype
            or getattr(arguments, "kv_cache_dtype", None),
            kv_scales=file_digest(pathlib.Path(scales)) if scales else "in the weights",
            rope=f"config.json + {rope}" if rope and rope != "{}" else "config.json",
            compute=" ".join(
                f"{name}={getattr(arguments, name, None)}"
                for name in ("dtype", "quantization", "revision")
            ),
        )


def _server_arguments() -> Any:
    """SGLang's arguments; None outside of a scheduler."""
    try:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    except Exception:  # noqa: BLE001: however it says that there are none
        return None
