"""The addresses of workers, wherever they are read."""

import pytest

from facedist import errors
from facedist.distributed.cluster import Cluster, split_address


@pytest.mark.parametrize(
  ("address", "parts"),
  [
    ("10.0.0.1:2222", ("10.0.0.1", 2222)),
    ("node-9.faces:1", ("node-9.faces", 1)),
    ("node_9.faces.:65535", ("node_9.faces.", 65535)),
    ("[fe80::1]:2222", ("fe80::1", 2222)),
    (f"{'a' * 63}.b:1", (f"{'a' * 63}.b", 1)),
  ],
)
def test_an_address_is_split_at_its_port(address: str, parts: tuple[str, int]):
  (worker,) = Cluster((address,)).workers
  assert split_address(worker) == parts


NO_PORT, WRONG_PORT, WRONG_HOST = "it has no port", "its port must", "its host must"


@pytest.mark.parametrize(
  ("address", "says"),
  [
    *((f"h0:{port}", WRONG_PORT) for port in ("0", "65536", "1e3", "-1", "٣", "")),
    *((address, NO_PORT) for address in ("h0", "")),
    ("::1:1000", "an IPv6 address stands in brackets"),
    ("[::1]", "an IPv6 address stands in brackets|its port"),
    ("[h0]:1000", "no IPv6 address in the brackets"),
    ("[10.0.0.1]:1000", "no IPv6 address in the brackets"),
    ("grpc://h0:1000", "an address has no scheme"),
    *((f"{host}:1000", WRONG_HOST) for host in ("", "a..b", ".h0", "-h0", " h0", "ä")),
    *((f"{host}:1000", WRONG_HOST) for host in ("h 0", "h0\n")),
    (f"{'a' * 64}.b:1000", "63 between two dots, so the job needs a shorter name"),
    (f"{'a.' * 128}:1000", "at most 253 characters"),
    ("10.0.0.256:1000", "neither a name nor an IPv4 address"),
    ("10.0.1:1000", "neither a name nor an IPv4 address"),
  ],
)
def test_an_address_that_nobody_can_call_is_refused(address: str, says: str):
  with pytest.raises(errors.UsageError, match=says) as caught:
    Cluster(("good:1000", address), 0, origin="TF_CONFIG")
  text = str(caught.value)
  assert text.startswith("TF_CONFIG has the worker address ")
  assert "\n" not in text
