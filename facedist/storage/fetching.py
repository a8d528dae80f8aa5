"""The bytes of an object: resumed after a cut, never of two generations mixed."""

import http
import time
from typing import Any

from facedist.storage import checksums, client, objects, settings

PAST_THE_END = http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
REPLACED = http.HTTPStatus.PRECONDITION_FAILED


class Sink:
  """Takes the bytes of an answer, one request after another.

  Attributes:
    stream: Where the bytes go.
    received: How many came.
    checksum: Their CRC-32C.
    until: When the request must be done, by time.monotonic; a body that trickles
      would else never time out.
  """

  def __init__(self, stream: Any, *, until: float = float("inf")) -> None:
    self.stream = stream
    self.received = 0
    self.checksum = 0
    self.until = until

  def write(self, chunk: bytes) -> int:
    """Appends a chunk."""
    if time.monotonic() > self.until:
      raise TimeoutError("the answer comes too slowly")
    self.stream.write(chunk)
    self.received += len(chunk)
    self.checksum = checksums.extend(self.checksum, chunk)
    return len(chunk)

  def clear(self) -> None:
    """Forgets all bytes."""
    self.stream.seek(0)
    self.stream.truncate()
    self.received = self.checksum = 0


def fetch(path: str, sink: Sink, start: int, end: int, generation: str | None) -> None:
  """Brings the bytes [start, end) of an object to the sink; less where it ends.

  After a cut it goes on with the byte that is missing, or, where no generation says
  that the object is still the same, from the start.

  Raises:
    client.StatusError: The object begins after `start` or was replaced.
  """
  before = sink.received
  deadline = time.monotonic() + settings.current().deadline_seconds

  def attempt(timeout: client.Timeout) -> None:
    if generation is None:
      sink.clear()
    sink.until = deadline
    objects.blob(path).download_to_file(
      sink,
      start=start + sink.received - before,
      end=end - 1,
      if_generation_match=None if generation is None else int(generation),
      raw_download=True,
      checksum=None,
      timeout=timeout,
      retry=None,
    )

  client.call(path, attempt, expect=(PAST_THE_END, REPLACED))
