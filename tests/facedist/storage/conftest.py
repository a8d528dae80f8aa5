"""Constants of facedist.storage with which its tests send less and wait less."""

import pytest

from facedist.storage import gcs, retry


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes 9 MB a large file: five pieces of a transfer each way."""
  monkeypatch.setattr(gcs, "_DOWNLOAD_PIECE_BYTES", 2 << 20)
  monkeypatch.setattr(gcs, "_UPLOAD_PIECE_BYTES", 2 << 20)
