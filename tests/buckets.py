"""A bucket over real HTTP for tests, with the faults that a real one has.

It is gcp-storage-emulator (PyPI) with what that lacks: threads and kept connections,
generation preconditions, pages of listings, ranges past the end, uploads
that are resumed after a cut, and the answers of a missing bucket and of a requester
who does not pay. A test gets it as the fixture `bucket`:

    def test_shards_are_read_through_faults(bucket):
      storage.write_bytes(f"{bucket}/a", b"x")
      bucket.faults.rate(0.1, seed=1)
      assert storage.read_bytes(f"{bucket}/a") == b"x"
      assert bucket.traffic.bytes_read(f"{bucket}/a") == 1
"""

import base64
import collections
import dataclasses
import fnmatch
import hashlib
import http
import http.server
import io
import json
import random
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator import storage as emulator_storage
from gcp_storage_emulator.handlers import buckets as emulator_buckets

KINDS = ("429", "500", "503", "drop", "lose", "truncate", "delay")
"""What can happen to a request.

A status is answered instead of what was asked for. `drop` closes the connection before
anything was done, `lose` after it was done, `truncate` in the middle of the answer.
`delay` answers late. Not among them, for the time they take: `trickle` sends the
answer in slices of 64 KiB with a delay before each, and `meet` waits until a number of
requests have been under way at once.
"""


@dataclasses.dataclass(frozen=True)
class Exchange:
  """One request and what became of it.

  Attributes:
    method: The HTTP method.
    path: Of the object or the listed bucket, `gs://faces/name`.
    status: What was answered; 0 where the connection was dropped.
    fault: The kind of fault put on it, or none.
    body_bytes: Of the object's content, sent in the answer.
    authorized: Whether the request showed credentials.
  """

  method: str
  path: str
  status: int
  fault: str | None
  body_bytes: int
  authorized: bool


class Traffic:
  """The requests to the server since the start or the last `clear`.

  Attributes:
    exchanges: Each request.
    under_way: Requests without an answer yet, those from before a `clear` left out.
    max_at_once: The largest number of these at a time.
  """

  def __init__(self) -> None:
    self.clear()

  def clear(self) -> None:
    """Forgets all requests."""
    self.exchanges: list[Exchange] = []
    self.under_way: set[object] = set()
    self.max_at_once = 0

  def begin(self, request: object) -> None:
    """Counts a request that has arrived."""
    self.under_way.add(request)
    self.max_at_once = max(self.max_at_once, len(self.under_way))

  def requests(self, path: str = "gs://*", method: str = "*") -> int:
    """Returns the number of requests for the paths that match a pattern."""
    return sum(
      fnmatch.fnmatchcase(one.path, path) and fnmatch.fnmatchcase(one.method, method)
      for one in self.exchanges
    )

  def bytes_read(self, path: str = "gs://*") -> int:
    """Returns the bytes of content sent for the paths that match a pattern."""
    return sum(
      one.body_bytes for one in self.exchanges if fnmatch.fnmatchcase(one.path, path)
    )

  def faults(self) -> collections.Counter[str]:
    """Returns how many requests each kind of fault has hit."""
    return collections.Counter(one.fault for one in self.exchanges if one.fault)


class Faults:
  """Decides which requests fail, and how.

  Whether a request fails depends on the seed, on its content and on how often it was
  repeated, not on the order in which threads send requests.
  """

  def __init__(self) -> None:
    self.clear()

  def clear(self) -> None:
    """Lets every request succeed."""
    self.always(times=0)
    self.requester_pays = False

  def rate(
    self,
    fraction: float,
    *,
    seed: int = 0,
    kinds: tuple[str, ...] = KINDS,
    delay_seconds: float = 0.3,
  ) -> None:
    """Lets a fraction of the requests fail, each in one of the ways of `kinds`."""
    self.always(delay_seconds=delay_seconds)
    self._fraction, self._seed, self._kinds = fraction, seed, kinds

  def always(
    self,
    kind: str = "delay",
    *,
    status: int | None = None,
    matching: str = "gs://*",
    method: str = "*",
    content_only: bool = False,
    times: float = float("inf"),
    message: str = "a fault of the test",
    delay_seconds: float | None = None,
    together: int = 1,
    meanwhile: Callable[[], object] | None = None,
  ) -> None:
    """Lets every request of a pattern fail in one way, for the first `times` of them.

    Args:
      kind: One of KINDS, `trickle` or `meet`.
      status: Or the HTTP status to answer with.
      matching: Pattern of the gs:// path.
      method: Pattern of the HTTP method.
      content_only: Whether only requests for an object's bytes fail, not for its facts.
      times: How many requests fail before all succeed again.
      message: What the answer with a status says.
      delay_seconds: How late an answer is with `delay`, a slice with `trickle` (0.3);
        how long it waits at most with `meet` (20).
      together: For how many requests at once an answer waits with `meet`.
      meanwhile: Is called when a request has taken effect and is not answered yet.
    """
    self._fraction, self._seed, self._kinds = 1.0, 0, (str(status or kind),)
    self._asked: collections.Counter[str] = collections.Counter()
    self._matching, self._method, self._left = matching, method, times
    self._content_only = content_only
    default = 20.0 if kind == "meet" else 0.3
    self.delay_seconds = default if delay_seconds is None else delay_seconds
    self.message, self.together, self.meanwhile = message, together, meanwhile

  def draw(self, method: str, path: str, details: str) -> str | None:
    """Returns the fault for this request, if it gets one."""
    asks = fnmatch.fnmatchcase(path, self._matching)
    asks = asks and (details.endswith("media") or not self._content_only)
    if not (asks and fnmatch.fnmatchcase(method, self._method)):
      return None
    request = f"{method} {path} {details}"
    self._asked[request] += 1
    text = f"{self._seed} {request} {self._asked[request]}"
    rng = random.Random(hashlib.sha256(text.encode()).digest())
    if rng.random() >= self._fraction or self._left < 1:
      return None
    self._left -= 1
    return rng.choice(self._kinds)


class Bucket(str):
  """The path of an empty bucket, `gs://faces`, and its strings.

  Attributes:
    faults: Decides which requests fail.
    traffic: The requests.
    endpoint: The server's address.
    server: The server, with the number of entries in a page of a listing.
  """

  faults: Faults
  traffic: Traffic
  endpoint: str
  server: "Server"

  @classmethod
  def at(cls, served: "Server", name: str) -> "Bucket":
    """Makes the bucket on the server and returns its path."""
    emulator_buckets.create_bucket(name, served.objects)
    made = cls(f"gs://{name}")
    made.faults, made.traffic = served.faults, served.traffic
    made.endpoint, made.server = served.endpoint, served
    return made


class _Objects(emulator_storage.Storage):
  """The emulator's memory, without writing all of its metadata at each change."""

  def _write_config_to_file(self) -> None:
    pass


class Server(http.server.ThreadingHTTPServer):
  """The bucket server on a free port of loopback; serves from `start` to `stop`."""

  daemon_threads = True
  block_on_close = False
  request_queue_size = 128

  def __init__(self) -> None:
    super().__init__(("127.0.0.1", 0), _Handler)
    self.objects = _Objects(use_memory_fs=True)
    self.lock = threading.Lock()
    self.met = threading.Condition(self.lock)
    self.endpoint = f"http://127.0.0.1:{self.server_port}"
    self.faults = Faults()
    self.traffic = Traffic()
    self.clear()

  def start(self) -> None:
    threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

  def stop(self) -> None:
    self.shutdown()
    self.server_close()

  def clear(self) -> None:
    """Forgets all buckets, faults and traffic."""
    with self.lock:
      self.objects.wipe()
      self.finished_uploads: dict[str, bytes] = {}
      self.conditions: dict[str, str] = {}  # ifGenerationMatch of an open upload
      self.max_per_page = 1000  # as in the real service
      self.faults.clear()
      self.traffic.clear()

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Keeps quiet about clients that hang up, as some tests make them do."""
    if not isinstance(sys.exc_info()[1], ConnectionError):
      super().handle_error(request, client_address)


class _Answer:
  """Stands in for the emulator's connection: keeps the answer, to be sent later."""

  def __init__(self, handler: "_Handler", body: bytes) -> None:
    self.path = handler.path
    self.headers = handler.headers
    self.server = handler.server
    self.storage = handler.server.objects
    self.rfile = io.BytesIO(body)
    self.wfile = io.BytesIO()
    self.status = 0
    self.reason = ""
    self.sent_headers: dict[str, str] = {}

  def send_response(self, status: int, reason: str) -> None:
    self.status, self.reason = int(status), reason

  def send_header(self, name: str, value: str) -> None:
    self.sent_headers[name] = value

  def end_headers(self) -> None:
    pass

  @property
  def body(self) -> bytes:
    return self.wfile.getvalue()

  def set(self, status: int, content: Any = None, **headers: str) -> None:
    """Replaces the whole answer; `content` is bytes or something for JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.status, self.wfile = status, io.BytesIO(body)
    self.reason = http.HTTPStatus(status).phrase
    self.sent_headers = {"Content-Type": "application/json", **headers}

  def refuse(self, status: int, message: str) -> None:
    """Answers with an error in the form of the real service."""
    self.set(status, {"error": {"code": status, "message": message}})


class _Handler(http.server.BaseHTTPRequestHandler):
  """Adds faults to requests, and corrects the emulator's answers."""

  protocol_version = "HTTP/1.1"
  server: Server
  timeout = 60
  disable_nagle_algorithm = True  # headers and body are two writes

  def log_message(self, format: str, *values: Any) -> None:
    pass

  def _serve(self) -> None:
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    asked = _Asked(self, body)
    with self.server.met:
      self.server.traffic.begin(asked)
      self.server.met.notify_all()
      fault = self.server.faults.draw(self.command, asked.gs_path, asked.details)
      answer = _Answer(self, body)
      if fault is not None and fault.isdigit():
        answer.refuse(int(fault), self.server.faults.message)
      elif fault != "drop":
        _answer(asked, answer, self.server)
      dropped = fault in ("drop", "lose")
      half = len(answer.body) // 2 if fault == "truncate" else len(answer.body)
      self.server.traffic.exchanges.append(
        Exchange(
          method=self.command,
          path=asked.gs_path,
          status=0 if dropped else answer.status,
          fault=fault,
          body_bytes=half if asked.is_media and answer.status in (200, 206) else 0,
          authorized="Authorization" in self.headers,
        )
      )
    faults, traffic = self.server.faults, self.server.traffic
    if fault == "meet":
      with self.server.met:
        self.server.met.wait_for(
          lambda: traffic.max_at_once >= faults.together, faults.delay_seconds
        )
    if fault is not None and faults.meanwhile is not None:
      faults.meanwhile()
    elif fault == "delay":
      time.sleep(faults.delay_seconds)
    with self.server.lock:  # before the client can know of it, and ask again
      self.server.traffic.under_way.discard(asked)
    if not dropped:
      self._send(answer, answer.body[:half], trickles=fault == "trickle")
    if dropped or half < len(answer.body):
      self.close_connection = True

  do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

  def _send(self, answer: _Answer, body: bytes, *, trickles: bool) -> None:
    self.send_response(answer.status, answer.reason)
    headers = {**answer.sent_headers, "Content-Length": str(len(answer.body))}
    for name, value in headers.items():
      self.send_header(name, value)
    self.end_headers()
    slice_bytes = 64 << 10 if trickles else max(1, len(body))
    for start in range(0, len(body), slice_bytes):
      if trickles:
        time.sleep(self.server.faults.delay_seconds)
      self.wfile.write(body[start : start + slice_bytes])


class _Asked:
  """A request, taken apart.

  Attributes:
    bucket: The bucket's name; empty where the request is about none.
    name: The object's name; empty for a listing.
    is_media: Whether it asks for an object's content.
    query: The parameters, each with its first value.
  """

  def __init__(self, handler: _Handler, body: bytes) -> None:
    url = urllib.parse.urlsplit(handler.path)
    self.method = handler.command
    self.headers = handler.headers
    self.body = body
    self.query = {
      name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()
    }
    _, _, rest = url.path.partition("/b/")
    bucket, _, rest = rest.partition("/")
    self.bucket = urllib.parse.unquote(bucket)
    self.name = urllib.parse.unquote(rest.removeprefix("o/")) if "/" in rest else ""
    self.is_upload = url.path.startswith("/upload/")
    self.upload_id = self.query.get("upload_id", "")
    self.is_media = self.query.get("alt") == "media" or "/download/" in url.path
    if self.is_upload and not self.upload_id:
      self.name = self.query.get("name") or _name_in(body)

  @property
  def gs_path(self) -> str:
    return f"gs://{self.bucket}/{self.name}" if self.name else f"gs://{self.bucket}"

  @property
  def details(self) -> str:
    """What tells this request from others for the same path."""
    pieces = ("Range", "Content-Range")
    listing = ("prefix", "pageToken", "uploadType", "alt")
    return " ".join(
      [self.headers.get(name) or "" for name in pieces]
      + [self.query.get(name, "") for name in listing]
    )


def _name_in(body: bytes) -> str:
  """Returns the object's name in the metadata at the head of an upload's body."""
  start = body.find(b"{")
  if start < 0:
    return ""
  text = body[start : start + 65536].decode(errors="replace")
  found, _ = json.JSONDecoder().raw_decode(text)
  return str(found.get("name", ""))


def _answer(asked: _Asked, answer: _Answer, server: Server) -> None:
  """Lets the emulator answer, and corrects the answer; holds the server's lock."""
  if asked.upload_id in server.finished_uploads:
    answer.set(200, server.finished_uploads[asked.upload_id])
    return
  if server.faults.requester_pays and "userProject" not in asked.query:
    message = "Bucket is a requester pays bucket but no user project provided."
    answer.refuse(400, message)
    return
  if asked.bucket not in server.objects.buckets:
    answer.refuse(404, "The specified bucket does not exist.")
    return
  if _breaks_precondition(asked, server):
    message = "At least one of the pre-conditions you specified did not hold."
    answer.refuse(412, message)
    return
  if asked.upload_id:
    _skip_what_arrived(asked, answer, server)
  emulator.Router(answer).handle(asked.method)
  if asked.upload_id or asked.is_upload:
    _fix_upload(asked, answer, server)
  elif asked.is_media:
    _fix_download(asked, answer, server)
  elif asked.method == "GET" and not asked.name:
    _fix_listing(asked, answer, server.max_per_page)
  if answer.status == 404:
    answer.refuse(404, f"No such object: {asked.gs_path.removeprefix('gs://')}")


def _found(asked: _Asked, server: Server) -> dict[str, Any] | None:
  return server.objects.objects.get(asked.bucket, {}).get(asked.name)


def _breaks_precondition(asked: _Asked, server: Server) -> bool:
  """Says whether the object is not the generation that the request is made for."""
  wanted = asked.query.get("ifGenerationMatch") or asked.query.get("generation")
  if asked.upload_id:
    wanted = server.conditions.get(asked.upload_id)
    open_upload = server.objects.resumable.get(asked.upload_id)
    if open_upload is not None:
      asked.name = open_upload["name"]
  if wanted is None:
    return False
  found = _found(asked, server)
  return wanted != (found["generation"] if found else "0")


def _skip_what_arrived(asked: _Asked, answer: _Answer, server: Server) -> None:
  """Drops the bytes of a repeated piece that the upload has already."""
  piece = re.fullmatch(
    r"bytes (\d+)-(\d+)/(\d+)", asked.headers.get("Content-Range") or ""
  )
  received = server.objects.get_resumable_byte_count(asked.upload_id)
  if not piece or int(piece[1]) >= received:
    return
  rest = asked.body[received - int(piece[1]) :]
  position = f"{received}-{piece[2]}" if rest else "*"
  asked.headers.replace_header("Content-Range", f"bytes {position}/{piece[3]}")
  asked.headers.replace_header("Content-Length", str(len(rest)))
  answer.rfile = io.BytesIO(rest)


def _fix_upload(asked: _Asked, answer: _Answer, server: Server) -> None:
  """Remembers finished uploads, and says truly how much of an open one arrived."""
  if asked.query.get("uploadType") == "resumable" and not asked.upload_id:
    url = answer.sent_headers.get("Location", "")
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
    condition = asked.query.get("ifGenerationMatch")
    if condition is not None and "upload_id" in query:
      server.conditions[query["upload_id"][0]] = condition
  elif asked.upload_id and answer.status == 200:
    server.finished_uploads[asked.upload_id] = answer.body
  elif asked.upload_id and answer.status == 308:
    received = server.objects.get_resumable_byte_count(asked.upload_id)
    answer.sent_headers.pop("Range", None)
    if received:
      answer.sent_headers["Range"] = f"bytes=0-{received - 1}"


def _fix_download(asked: _Asked, answer: _Answer, server: Server) -> None:
  """Adds the headers of the real service; a range past the end is refused."""
  found = _found(asked, server)
  if found is None or answer.status not in (200, 206):
    return
  size = int(found["size"])
  start = re.match(r"bytes=(\d+)-", asked.headers.get("Range") or "")
  if start and int(start[1]) >= size:
    answer.refuse(416, "The requested range cannot be satisfied.")
    answer.sent_headers["Content-Range"] = f"bytes */{size}"
    return
  answer.sent_headers["X-Goog-Generation"] = found["generation"]
  answer.sent_headers["X-Goog-Stored-Content-Length"] = str(size)
  answer.sent_headers["X-Goog-Stored-Content-Encoding"] = "identity"


def _fix_listing(asked: _Asked, answer: _Answer, max_per_page: int) -> None:
  """Sorts a listing by bytes and cuts it into pages."""
  if answer.status != 200:
    return
  listing = json.loads(answer.body)
  items = {item["name"].encode(): item for item in listing.get("items", [])}
  prefixes = {prefix.encode() for prefix in listing.get("prefixes", [])}
  after = base64.b64decode(asked.query.get("pageToken", ""))
  left = [name for name in sorted({*items, *prefixes}) if name > after]
  count = min(max_per_page, int(asked.query.get("maxResults") or max_per_page))
  page = left[:count]
  content: dict[str, Any] = {
    "kind": "storage#objects",
    "items": [items[name] for name in page if name in items],
    "prefixes": [name.decode() for name in page if name in prefixes],
  }
  if len(left) > count:
    content["nextPageToken"] = base64.b64encode(page[-1]).decode()
  answer.set(200, content)
