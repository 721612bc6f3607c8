import pathlib
import re
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

DOCUMENT = pathlib.Path(__file__).resolve().parents[3] / "client/python/docs/trtllm.md"


@pytest.fixture(scope="session")
def documented():
    """kv_connector_config of the document, to the letter."""
    import yaml

    text = re.search("```yaml\n(.*?)```", DOCUMENT.read_text(), re.S).group(1)
    return yaml.safe_load(text)["kv_connector_config"]
