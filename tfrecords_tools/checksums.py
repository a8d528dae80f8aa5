"""CRC-32C of a whole from those of its parts, which many processes compute."""

import functools

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, its lowest power in the highest bit


def combine(first: int, second: int, *, length: int) -> int:
  """Returns the CRC-32C of two contents one after the other.

  Args:
    first: CRC-32C of the first content.
    second: CRC-32C of the second.
    length: Bytes of the second.

  A CRC is linear over bits: the first one's is carried over `8 * length` zero bits, by
  a matrix for each power of two, and the second's is added (zlib's crc32_combine).
  """
  bits = 8 * length
  for exponent in range(bits.bit_length()):
    if bits >> exponent & 1:
      first = _times(_zeros(exponent), first)
  return first ^ second


@functools.cache
def _zeros(exponent: int) -> tuple[int, ...]:
  """Returns the columns of the matrix that carries a CRC over 2**exponent zero bits."""
  if exponent == 0:
    return (_POLYNOMIAL, *(1 << bit for bit in range(31)))
  half = _zeros(exponent - 1)
  return tuple(_times(half, column) for column in half)


def _times(matrix: tuple[int, ...], vector: int) -> int:
  """Returns the product over bits: the sum of the columns that `vector` picks."""
  product = 0
  for column in matrix:
    if vector & 1:
      product ^= column
    vector >>= 1
  return product
