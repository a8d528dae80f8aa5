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
    ("[::1]:1000", ("::1", 1000)),
    (f"{'a' * 63}.b:1", (f"{'a' * 63}.b", 1)),
  ],
)
def test_an_address_is_split_at_its_port(address: str, parts: tuple[str, int]):
  (worker,) = Cluster((address,)).workers
  assert split_address(worker) == parts


@pytest.mark.parametrize(
  ("address", "says"),
  [
    ("h0:0", "its port must be a whole number of 1 to 65535"),
    ("h0:99999", "its port must be"),
    ("h0:65536", "its port must be"),
    ("h0:1e3", "its port must be"),
    ("h0:-1", "its port must be"),
    ("h0:٣", "its port must be"),
    ("h0:", "its port must be"),
    ("h0", "it has no port"),
    ("", "it has no port"),
    ("::1:1000", "an IPv6 address stands in brackets"),
    ("fe80::1:1000", "an IPv6 address stands in brackets"),
    ("[::1]", "an IPv6 address stands in brackets|its port"),
    ("[h0]:1000", "no IPv6 address in the brackets"),
    ("[10.0.0.1]:1000", "no IPv6 address in the brackets"),
    ("grpc://h0:1000", "an address has no scheme"),
    ("a..b:1000", "its host must be letters"),
    (":1000", "its host must be letters"),
    (".h0:1000", "its host must be letters"),
    ("-h0:1000", "its host must be letters"),
    ("h 0:1000", "its host must be letters"),
    (" h0:1000", "its host must be letters"),
    ("h0\n:1000", "its host must be letters"),
    ("gesicht-ä:1000", "its host must be letters"),
    (f"{'a' * 64}.b:1000", "63 between two dots, so the job needs a shorter name"),
    (f"{'a.' * 128}:1000", "at most 253 characters|63 between"),
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
