"""The faults and counts of the tests' bucket server; storage's tests show more."""

import concurrent.futures

import pytest
import requests

from tests import buckets


class Raw:
  """Plain HTTP to the bucket's server, in Google's JSON interface."""

  def __init__(self, bucket: buckets.Bucket) -> None:
    self.base = f"{bucket.endpoint}/storage/v1/b/faces/o"
    self.upload_base = f"{bucket.endpoint}/upload/storage/v1/b/faces/o"
    self.session = requests.Session()

  def put(self, name: str, content: bytes) -> requests.Response:
    parameters = {"uploadType": "media", "name": name}
    return self.session.post(self.upload_base, params=parameters, data=content)

  def get(self, name: str, start: int = 0) -> requests.Response:
    headers = {"Range": f"bytes={start}-"} if start else {}
    url = f"{self.base}/{name}"
    return self.session.get(url, params={"alt": "media"}, headers=headers)


@pytest.fixture
def raw(bucket: buckets.Bucket):
  """A client that knows nothing of retries."""
  made = Raw(bucket)
  yield made
  made.session.close()


def test_a_fraction_of_requests_fails_in_every_way_by_the_seed():
  def draws(seed: int, order: range) -> dict[int, str | None]:
    faults = buckets.Faults()
    faults.rate(0.1, seed=seed)
    return {number: faults.draw("GET", f"gs://faces/{number}", "") for number in order}

  drawn = draws(1, range(2000))
  failed = [kind for kind in drawn.values() if kind is not None]
  assert 150 < len(failed) < 250
  assert set(failed) == set(buckets.KINDS)
  assert draws(1, range(1999, -1, -1)) == drawn  # whatever the order of the requests
  assert draws(2, range(2000)) != drawn


def test_a_repeated_request_succeeds_at_some_time():
  faults = buckets.Faults()
  faults.rate(0.5, seed=0)
  drawn = {faults.draw("GET", "gs://faces/a", "") is None for _ in range(20)}
  assert drawn == {True, False}


def test_faults_keep_to_their_pattern_and_number(bucket, raw):
  raw.put("a", b"x")
  raw.put("b", b"x")
  bucket.faults.always(status=503, matching="gs://faces/a", times=2, message="later")
  assert [raw.get(name).status_code for name in "abaa"] == [503, 200, 503, 200]
  bucket.faults.always(status=403, method="POST", message="not yours")
  assert raw.get("a").status_code == 200
  refused = raw.put("a", b"y")
  assert (refused.status_code, refused.json()["error"]["message"]) == (403, "not yours")


def test_delayed_answers_do_not_wait_for_each_other(bucket, raw):
  raw.put("a", b"x")
  bucket.faults.always("delay", delay_seconds=0.5)
  with concurrent.futures.ThreadPoolExecutor(20) as pool:
    answers = list(pool.map(lambda _: raw.get("a").content, range(20)))
  assert answers == [b"x"] * 20
  assert bucket.traffic.max_at_once > 1


def test_answers_that_wait_for_others_count_simultaneous_requests(bucket, raw):
  raw.put("a", b"x")
  bucket.traffic.clear()
  bucket.faults.always("meet", together=20)
  with concurrent.futures.ThreadPoolExecutor(20) as pool:
    answers = list(pool.map(lambda _: raw.get("a").content, range(40)))
  assert answers == [b"x"] * 40
  assert bucket.traffic.max_at_once == 20
  bucket.traffic.clear()
  bucket.faults.always("meet", together=2, delay_seconds=0.01)
  assert raw.get("a").content == b"x"  # nobody else comes
  assert bucket.traffic.max_at_once == 1


def test_a_precondition_holds_until_a_resumable_upload_is_done(raw):
  query = {"uploadType": "resumable", "ifGenerationMatch": "0"}
  begun = raw.session.post(raw.upload_base, params=query, json={"name": "a"})
  raw.put("a", b"first")
  headers = {"Content-Range": "bytes 0-2/3"}
  late = raw.session.put(begun.headers["Location"], data=b"xyz", headers=headers)
  assert late.status_code == 412
  assert raw.get("a").content == b"first"


def test_a_resumable_upload_says_what_it_has_and_ends_once(raw):
  query = {"uploadType": "resumable"}
  begun = raw.session.post(raw.upload_base, params=query, json={"name": "a"})

  def send(content: bytes, position: str) -> requests.Response:
    headers = {"Content-Range": f"bytes {position}/6"}
    return raw.session.put(begun.headers["Location"], data=content, headers=headers)

  nothing = send(b"", "*")
  assert (nothing.status_code, nothing.headers.get("Range")) == (308, None)
  half = send(b"abc", "0-2")
  assert (half.status_code, half.headers["Range"]) == (308, "bytes=0-2")
  assert send(b"", "*").headers["Range"] == "bytes=0-2"
  assert send(b"abc", "0-2").headers["Range"] == "bytes=0-2"  # a repetition
  done = send(b"cdef", "2-5")
  again = send(b"", "*")
  assert (done.status_code, again.status_code) == (200, 200)
  assert again.json()["generation"] == done.json()["generation"]
  assert raw.get("a").content == b"abcdef"


def test_a_range_past_the_end_is_refused(raw):
  raw.put("a", b"0123")
  assert raw.get("a", start=3).content == b"3"
  refused = raw.get("a", start=4)
  assert (refused.status_code, refused.headers["Content-Range"]) == (416, "bytes */4")


def test_traffic_is_counted_by_path_and_method(bucket, raw):
  raw.put("in/a", b"xyz")
  raw.put("b", b"xy")
  for _ in range(3):
    raw.get("in/a")
  raw.get("in/a", start=2)
  assert bucket.traffic.requests() == 6
  assert bucket.traffic.requests("gs://faces/in/*", "GET") == 4
  assert bucket.traffic.bytes_read("gs://faces/in/a") == 10
  assert bucket.traffic.bytes_read() == 10
