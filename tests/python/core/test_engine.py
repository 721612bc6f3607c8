"""larder._engine: what adapters make of what the user wrote."""

import dataclasses
import hashlib
import json
import struct

import pytest

from larder._engine import rope_text, settings_from, weights_digest, weights_told


@dataclasses.dataclass
class Settings:
    socket: str | None = None
    chunk_tokens: int = 256


def test_unknown_settings_are_refused_with_the_known_ones_named():
    assert settings_from(Settings, {"socket": "/s"}, "here") == Settings("/s")
    with pytest.raises(ValueError, match="here: .* chunks; .* chunk_tokens, socket"):
        settings_from(Settings, {"socket": "/s", "chunks": 1}, "here")


def test_weights_are_told_or_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"told").digest()
    assert weights_told(digest.hex(), "nowhere") == digest
    assert weights_told(None, str(tmp_path)) == weights_digest(str(tmp_path))
    for wrong in ("", "aa", digest.hex() + "00", "model@1"):
        with pytest.raises(ValueError, match="64 hexadecimal"):
            weights_told(wrong, str(tmp_path))
    with pytest.raises(ValueError, match="neither"):
        weights_told(None, None)
    with pytest.raises(FileNotFoundError):
        weights_told(None, str(tmp_path / "none"))


def test_a_rope_text_fits_into_a_space():
    small = {"rope_theta": 1e4, "rope_type": "default"}
    assert rope_text(small) == '{"rope_theta": 10000.0, "rope_type": "default"}'
    assert rope_text(small, (",", ":")) == '{"rope_theta":10000.0,"rope_type":"default"}'
    # As transformers reads the floats of a file.
    factors = [struct.unpack("f", struct.pack("f", 1 + i / 100))[0] for i in range(48)]
    long = {"short_factor": factors, "long_factor": tuple(factors)}
    assert len(json.dumps(long)) > 1024
    told = json.loads(rope_text(long))
    assert told["short_factor"] == told["long_factor"]
    assert told["short_factor"][:3] == [1.0, 1.01, 1.02]
    for of, short in zip(factors, told["short_factor"], strict=True):
        assert struct.pack("f", of) == struct.pack("f", short)
    many = {"long_factor": [i / 7 for i in range(512)]}
    assert rope_text(many).startswith("sha256:")
    assert len(rope_text(many)) == 71
    assert rope_text(many) != rope_text({"long_factor": [i / 7 for i in range(511)]})
