"""larder._engine: what adapters make of what the user wrote."""

import dataclasses
import hashlib

import pytest

from larder._engine import settings_from, weights_digest, weights_told


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
