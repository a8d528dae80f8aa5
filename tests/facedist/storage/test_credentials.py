"""Credentials: which are used, the messages for wrong ones, and that none is logged."""

import datetime
import http.server
import ipaddress
import json
import logging
import pathlib
import ssl
import threading
from collections.abc import Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from facedist import errors, storage
from facedist.storage import gcs, retry
from tests import buckets

TOKEN = "ya29.very-secret"


@pytest.fixture(scope="module")
def private_key() -> rsa.RSAPrivateKey:
  """The key of the service account and of the server."""
  return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def token_server() -> Iterator[http.server.HTTPServer]:
  """Gives TOKEN to whoever asks, or answers with its attribute `refusal`."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, format: str, *values: object) -> None:
      pass

    def do_POST(self) -> None:
      self.rfile.read(int(self.headers["Content-Length"]))
      refusal = self.server.refusal  # type: ignore[attr-defined]
      answer = refusal or {"access_token": TOKEN, "expires_in": 3600}
      body = json.dumps(answer).encode()
      self.send_response(400 if refusal else 200)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.refusal = None  # type: ignore[attr-defined]
  threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
  yield server
  server.shutdown()
  server.server_close()


@pytest.fixture
def account(private_key, token_server, tmp_path, monkeypatch) -> pathlib.Path:
  """A service account's key file, named in the environment as a user would."""
  pem = private_key.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
  )
  key = {
    "type": "service_account",
    "project_id": "project",
    "private_key_id": "very-secret-id",
    "private_key": pem.decode(),
    "client_email": "trainer@project.iam.gserviceaccount.com",
    "token_uri": f"http://127.0.0.1:{token_server.server_port}/token",
  }
  path = tmp_path / "key.json"
  path.write_text(json.dumps(key))
  monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
  return path


@pytest.fixture
def secure_bucket(private_key, tmp_path, monkeypatch) -> Iterator[buckets.Bucket]:
  """A bucket behind TLS, at a custom endpoint, whose certificate is trusted."""
  certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
  certificate.write_bytes(_certificate(private_key))
  key.write_bytes(
    private_key.private_bytes(
      serialization.Encoding.PEM,
      serialization.PrivateFormat.TraditionalOpenSSL,
      serialization.NoEncryption(),
    )
  )
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(certificate, key)
  server = buckets.Server()
  server.socket = context.wrap_socket(server.socket, server_side=True)
  server.endpoint = server.endpoint.replace("http://", "https://")
  server.start()
  monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
  monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
  monkeypatch.setenv("FACEDIST_STORAGE_ENDPOINT", server.endpoint)
  monkeypatch.setenv("FACEDIST_STORAGE_DEADLINE_SECONDS", "30")
  yield buckets.Bucket.at(server, "faces")
  storage.close()
  server.stop()


def _certificate(key: rsa.RSAPrivateKey) -> bytes:
  """Returns a certificate of 127.0.0.1, signed by itself."""
  name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
  now = datetime.datetime.now(datetime.UTC)
  address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
  made = (
    x509.CertificateBuilder()
    .subject_name(name)
    .issuer_name(name)
    .public_key(key.public_key())
    .serial_number(1)
    .not_valid_before(now - datetime.timedelta(days=1))
    .not_valid_after(now + datetime.timedelta(days=1))
    .add_extension(x509.SubjectAlternativeName([address]), critical=False)
    .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    .sign(key, hashes.SHA256())
  )
  return made.public_bytes(serialization.Encoding.PEM)


@pytest.mark.usefixtures("account")
def test_the_default_credentials_are_used_and_never_logged(
  secure_bucket: buckets.Bucket, tmp_path, caplog, capfd
):
  caplog.set_level(logging.DEBUG)
  secure_bucket.faults.rate(0.3, seed=1)
  for number in range(10):
    storage.write_bytes(f"{secure_bucket}/{number}", b"x")
    storage.download(f"{secure_bucket}/{number}", str(tmp_path / str(number)))
  traffic = secure_bucket.traffic
  assert traffic.authorized() == traffic.requests() > 0
  secure_bucket.faults.always(
    status=403, message=f"Authorization: Bearer {TOKEN} access_token={TOKEN}"
  )
  with pytest.raises(errors.AccessError, match="permission denied") as caught:
    storage.read_bytes(f"{secure_bucket}/0")
  logging.getLogger("facedist").debug("this level is logged")
  printed = "".join(capfd.readouterr())
  assert "this level is logged" in caplog.text
  for text in (caplog.text, printed, str(caught.value)):
    assert "very-secret" not in text
    assert "PRIVATE KEY" not in text


def test_the_address_of_an_upload_s_session_is_never_logged(
  bucket: buckets.Bucket, tmp_path, caplog, monkeypatch
):
  """Whoever knows it may write, without any other credential."""
  caplog.set_level(logging.DEBUG)
  monkeypatch.setattr(gcs, "_UPLOAD_PIECE_BYTES", 4 << 20)
  (tmp_path / "large").write_bytes(bytes(9 << 20))
  bucket.faults.always(status=503, method="PUT", times=5, message="upload_id=AB-12")
  storage.upload(str(tmp_path / "large"), f"{bucket}/large")
  assert bucket.traffic.requests(method="PUT") >= 3  # in a session
  assert "503 upload_id=[removed]; attempt 4 failed" in caplog.text
  assert "AB-12" not in caplog.text
  assert "upload_id=" not in caplog.text.replace("upload_id=[removed]", "")


@pytest.mark.usefixtures("account")
def test_a_token_that_the_bucket_does_not_accept_is_one_line(secure_bucket):
  secure_bucket.faults.always(status=401, message="Invalid Credentials")
  with pytest.raises(errors.AccessError) as caught:
    storage.read_bytes(f"{secure_bucket}/a")
  assert str(caught.value) == (
    "gs://faces/a: no valid Google Cloud credentials (401 Invalid Credentials); run "
    "`gcloud auth application-default login` or attach a service account."
  )
  assert secure_bucket.traffic.requests() <= 4  # the library asks for new tokens


@pytest.mark.usefixtures("account")
def test_a_revoked_key_is_one_line(secure_bucket, token_server):
  token_server.refusal = {
    "error": "invalid_grant",
    "error_description": "Invalid JWT Signature.",
  }
  with pytest.raises(errors.AccessError) as caught:
    storage.read_bytes(f"{secure_bucket}/a")
  line = str(caught.value)
  assert line.startswith("gs://faces/a: no valid Google Cloud credentials (RefreshErr")
  assert "Invalid JWT Signature" in line
  assert line.endswith("attach a service account.")
  assert "\n" not in line
  assert secure_bucket.traffic.requests() == 0


@pytest.mark.parametrize("content", [None, "{}", "no JSON, but very-secret"])
def test_credentials_that_cannot_be_read_are_one_line(
  secure_bucket, tmp_path, monkeypatch, content: str | None
):
  path = tmp_path / "other.json"
  if content is not None:
    path.write_text(content)
  monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
  with pytest.raises(errors.AccessError) as caught:
    storage.read_bytes(f"{secure_bucket}/a")
  line = str(caught.value)
  assert line.startswith("gs://faces/a: no valid Google Cloud credentials (DefaultCred")
  assert "\n" not in line
  assert "very-secret" not in line


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
