"""Credentials: which are used, the messages for wrong ones, and that none is logged."""

import http.server
import json
import logging
import pathlib
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator

import pytest

from facedist import errors, storage
from facedist.storage import retry
from tests import buckets

TOKEN = "ya29.very-secret"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A key, of the service account and of the server, and a certificate of 127.0.0.1."""
  if shutil.which("openssl") is None:
    pytest.skip("openssl is not installed")
  path = tmp_path_factory.mktemp("tls") / "server.pem"
  subprocess.run(
    [
      *(
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=test",
      ),
      *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path)),
      *("-out", str(path.with_suffix(".crt"))),
    ],
    check=True,
    capture_output=True,
  )
  return path


@pytest.fixture
def token_server() -> Iterator[http.server.HTTPServer]:
  """Gives TOKEN to whoever asks, or answers with its attribute `refusal`."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, format: str, *values: object) -> None:
      pass

    def do_POST(self) -> None:
      self.rfile.read(int(self.headers["Content-Length"]))
      refusal = self.server.refusal  # type: ignore[attr-defined]
      self.send_response(400 if refusal else 200)
      self.end_headers()
      answer = refusal or {"access_token": TOKEN, "expires_in": 3600}
      self.wfile.write(json.dumps(answer).encode())

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    server.refusal = None  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def account(certificate, token_server, tmp_path, monkeypatch) -> None:
  """A service account's key file, named in the environment as a user would."""
  key = {
    "type": "service_account",
    "project_id": "project",
    "private_key_id": "very-secret-id",
    "private_key": certificate.read_text(),
    "client_email": "trainer@project.iam.gserviceaccount.com",
    "token_uri": f"http://127.0.0.1:{token_server.server_port}/token",
  }
  (tmp_path / "key.json").write_text(json.dumps(key))
  monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))


@pytest.fixture
def secure_bucket(certificate, monkeypatch) -> Iterator[buckets.Bucket]:
  """A bucket behind TLS, at a custom endpoint, whose certificate is trusted."""
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(certificate.with_suffix(".crt"), certificate)
  server = buckets.Server()
  server.socket = context.wrap_socket(server.socket, server_side=True)
  server.endpoint = server.endpoint.replace("http://", "https://")
  server.start()
  monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
  monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.with_suffix(".crt")))
  monkeypatch.setenv("FACEDIST_STORAGE_ENDPOINT", server.endpoint)
  monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "30")
  yield buckets.Bucket.at(server, "faces")
  storage.close()
  server.stop()


@pytest.mark.usefixtures("account")
def test_the_default_credentials_are_used_and_never_logged(
  secure_bucket: buckets.Bucket, tmp_path, caplog, capfd
):
  caplog.set_level(logging.DEBUG)
  secure_bucket.faults.rate(0.3, seed=1)
  for number in range(10):
    storage.write_bytes(f"{secure_bucket}/{number}", b"x")
    storage.download(f"{secure_bucket}/{number}", str(tmp_path / str(number)))
  assert {one.authorized for one in secure_bucket.traffic.exchanges} == {True}
  secure_bucket.faults.always(
    status=403, message=f"Authorization: Bearer {TOKEN} access_token={TOKEN}"
  )
  with pytest.raises(errors.AccessError, match="permission denied") as caught:
    storage.read_bytes(f"{secure_bucket}/0")
  logging.getLogger("facedist").debug("this level is logged")
  assert "this level is logged" in caplog.text
  for text in (caplog.text, *capfd.readouterr(), str(caught.value)):
    assert "very-secret" not in text
    assert "PRIVATE KEY" not in text


@pytest.mark.usefixtures("small_pieces")
def test_the_address_of_an_upload_s_session_is_never_logged(
  bucket: buckets.Bucket, tmp_path, caplog
):
  """Whoever knows it may write, without any other credential."""
  caplog.set_level(logging.DEBUG)
  (tmp_path / "large").write_bytes(bytes(9_000_000))
  bucket.faults.always(status=503, method="PUT", times=5, message="upload_id=AB-12")
  storage.upload(str(tmp_path / "large"), f"{bucket}/large")
  assert bucket.traffic.requests(method="PUT") >= 3  # in a session
  assert "503 upload_id=[removed]; attempt 4 failed" in caplog.text
  assert "attempt 3 failed" not in caplog.text  # few failures are normal
  assert "upload_id=" not in caplog.text.replace("upload_id=[removed]", "")


def refusal_of(bucket: buckets.Bucket) -> str:
  """Returns the one line of a read without valid credentials."""
  with pytest.raises(errors.AccessError) as caught:
    storage.read_bytes(f"{bucket}/a")
  line = str(caught.value)
  assert line.startswith("gs://faces/a: no valid Google Cloud credentials (")
  assert line.endswith(
    "; run `gcloud auth application-default login` or attach a service account."
  )
  assert "\n" not in line
  assert "very-secret" not in line
  return line


@pytest.mark.usefixtures("account")
def test_a_token_that_the_bucket_does_not_accept_is_one_line(secure_bucket):
  secure_bucket.faults.always(status=401, message="Invalid Credentials")
  assert "(401 Invalid Credentials)" in refusal_of(secure_bucket)
  assert secure_bucket.traffic.requests() <= 4  # the library asks for new tokens


@pytest.mark.usefixtures("account")
def test_a_revoked_key_is_one_line(secure_bucket, token_server):
  reason = "Invalid JWT Signature"
  token_server.refusal = {"error": "invalid_grant", "error_description": reason}
  line = refusal_of(secure_bucket)
  assert "(RefreshErr" in line
  assert reason in line
  assert secure_bucket.traffic.requests() == 0


@pytest.mark.parametrize("content", [None, "{}", "no JSON, but very-secret"])
def test_credentials_that_cannot_be_read_are_one_line(
  secure_bucket, tmp_path, monkeypatch, content: str | None
):
  path = tmp_path / "other.json"
  if content is not None:
    path.write_text(content)
  monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
  assert "(DefaultCred" in refusal_of(secure_bucket)


@pytest.mark.usefixtures("account")
def test_credentials_are_not_sent_without_encryption(bucket, monkeypatch):
  """Default credentials are there, and would be used over https."""
  monkeypatch.delenv("STORAGE_EMULATOR_HOST")  # with it, the library sends none
  monkeypatch.setenv("FACEDIST_STORAGE_ENDPOINT", bucket.endpoint)
  storage.write_bytes(f"{bucket}/a", b"x")
  assert {one.authorized for one in bucket.traffic.exchanges} == {False}


@pytest.mark.parametrize(
  "text",
  [
    "Authorization: Bearer very-secret",
    "token ya29.very-secret was not accepted",
    '{"access_token": "very-secret", "expires_in": 10}',
    "https://host/path?access_token=very-secret&alt=media",
    "client_secret=very-secret\nnext line",
    "PUT https://host/upload?uploadType=resumable&upload_id=very-secret\n: 410",
  ],
)
def test_text_that_resembles_a_token_is_removed_from_messages(text: str):
  line = retry.redact(text)
  assert "very-secret" not in line
  assert "[removed]" in line
  assert "\n" not in line


def test_messages_are_cut_to_one_readable_line():
  assert retry.redact("a" * 1000) == "a" * 300 + "…"
