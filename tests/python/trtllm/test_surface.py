"""TensorRT-LLM's connector interface as it is written down in surface.lock, against
the adapter and the harness: the engine itself cannot be installed here."""

import dataclasses
import inspect

import executor
import pytest
import surface

import larder.trtllm

HOME = "tensorrt_llm._torch.pyexecutor.kv_cache_connector."
LOCK = {
    name.removeprefix(HOME): text
    for name, text in surface.read(surface.locked("trtllm"))[1].items()
}
OURS = {
    "KvCacheConnectorScheduler": larder.trtllm.LarderScheduler,
    "KvCacheConnectorWorker": larder.trtllm.LarderWorker,
}
ABSTRACT = [name for name, text in LOCK.items() if text.startswith(surface.ABSTRACT)]


@pytest.mark.parametrize("name", ABSTRACT)
def test_what_is_abstract_is_there_and_takes_the_same(name):
    cls, method = name.split(".")
    takes = list(inspect.signature(getattr(OURS[cls], method)).parameters)
    assert takes == surface.parameters(LOCK[name])


@pytest.mark.parametrize("cls", [executor.RequestData, executor.SchedulerOutput])
def test_the_harness_has_the_fields(cls):
    fields = {n.split(".")[1] for n in LOCK if n.startswith(f"{cls.__name__}.")}
    assert fields and fields <= {field.name for field in dataclasses.fields(cls)}
