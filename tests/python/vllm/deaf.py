"""A connector for tests, whose second rank saves nothing while a file is there."""

import pathlib

from larder.vllm import LarderConnector


class DeafConnector(LarderConnector):
    """`deaf`, in its extra config, is the file."""

    def __init__(self, vllm_config, role, kv_cache_config):
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._deaf = pathlib.Path(extra.pop("deaf"))
        super().__init__(vllm_config, role, kv_cache_config)
        self._rank = vllm_config.parallel_config.rank

    def wait_for_save(self):
        if self._rank == 1 and self._deaf.exists():
            self._step().saves.clear()
        super().wait_for_save()
