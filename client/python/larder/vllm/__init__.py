"""Larder under vLLM: `LarderConnector` (KVConnectorBase_V1) and `LarderTier`
(SecondaryTierManager). How to switch them on: docs/vllm.md."""


def __getattr__(name: str):
    # vLLM imports this in every process, for its plugin: cheap until needed.
    if name == "LarderConnector":
        from .connector import LarderConnector

        return LarderConnector
    if name == "LarderTier":
        from .tier import LarderTier

        return LarderTier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """The `vllm.general_plugins` entry point: makes the tier known by its name."""
    try:
        from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

        if "larder" not in SecondaryTierFactory._registry:
            SecondaryTierFactory.register_tier("larder", "larder.vllm", "LarderTier")
    except ImportError:
        pass  # a vLLM without tiers
