"""The guide's examples."""

import documents
import numpy as np


def test_the_guide(daemon):
    documents.run("client/python/docs/python.md", socket=daemon.socket, np=np)
