"""The fields of a tar file's headers."""

BLOCK_BYTES = 512


def number(field: bytes) -> int | None:
  """Returns a number in octal digits, or in GNU's way big-endian after a byte 0x80.

  None if it is neither; no digits are 0.
  """
  if field[:1] == b"\x80":
    return int.from_bytes(field[1:], "big")
  text = field.partition(b"\0")[0].strip()
  return int(text or b"0", 8) if all(digit in b"01234567" for digit in text) else None


def is_sum_right(block: bytes) -> bool:
  """Says whether a header's sum is that of its bytes, taken unsigned or signed."""
  without = block[:148] + b" " * 8 + block[156:]
  unsigned = sum(without)
  wanted = number(block[148:156])
  return wanted == unsigned or wanted == unsigned - 256 * sum(
    byte > 127 for byte in without
  )


def pax_records(content: bytes) -> dict[bytes, bytes] | None:
  """Reads records `length key=value`; None if they are none."""
  found = {}
  while content.strip(b"\0"):
    digits, _, rest = content.partition(b" ")
    length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
    record = rest[: max(0, length - len(digits) - 1)]
    key, equals, value = record.removesuffix(b"\n").partition(b"=")
    if not record.endswith(b"\n") or not equals or length > len(content):
      return None
    found[key] = value
    content = content[length:]
  return found


def padded(size: int) -> int:
  """Returns the bytes of whole blocks that a content takes."""
  return -(-size // BLOCK_BYTES) * BLOCK_BYTES
