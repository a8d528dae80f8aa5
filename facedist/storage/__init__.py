"""Paths, local and gs://: the one place that reads, writes and lists files.

Every write is atomic: the final name holds the whole content or does not exist.
Bucket access goes through google-cloud-storage with checksums, resumed transfers,
preconditions and one retry policy with a deadline, which TensorFlow's own gs:// file
system lacks.

Modules: `paths` has the functions for any path; `local` and `gcs` implement them for a
disk and a bucket; `retry` has the settings and the retry policy of buckets; `checksums`
has CRC-32C; `contents` recognises files that are not what they should be.

Every function may raise, for a path in a bucket, errors.AccessError (there is no such
bucket, or we may not use it) and errors.UnreachableError (it did not answer in time).
"""

from facedist.storage.checksums import crc32c, crc32c_of
from facedist.storage.checksums import extend as extend_crc32c
from facedist.storage.contents import HEAD_BYTES, kind_of, kind_of_text, refuse_kind
from facedist.storage.gcs import close, replace_object, stored_crc32c
from facedist.storage.local import (
  explain,
  is_pattern,
  new_folder,
  partial_file,
  plain_name,
  readable,
  unreadable,
)
from facedist.storage.paths import (
  BUCKET_PREFIX,
  Entry,
  Status,
  check_file,
  check_folder,
  download,
  exists,
  generation,
  is_bucket,
  join,
  kind_of_file,
  list_names,
  local_copy,
  new_file,
  open_lines,
  read_bytes,
  read_range,
  remove,
  scratch,
  size,
  status,
  upload,
  walk,
  write_bytes,
)

__all__ = [
  "BUCKET_PREFIX",
  "HEAD_BYTES",
  "Entry",
  "Status",
  "check_file",
  "check_folder",
  "close",
  "crc32c",
  "crc32c_of",
  "download",
  "exists",
  "explain",
  "extend_crc32c",
  "generation",
  "is_bucket",
  "is_pattern",
  "join",
  "kind_of",
  "kind_of_file",
  "kind_of_text",
  "list_names",
  "local_copy",
  "new_file",
  "new_folder",
  "open_lines",
  "partial_file",
  "plain_name",
  "read_bytes",
  "read_range",
  "readable",
  "refuse_kind",
  "remove",
  "replace_object",
  "scratch",
  "size",
  "status",
  "stored_crc32c",
  "unreadable",
  "upload",
  "walk",
  "write_bytes",
]
