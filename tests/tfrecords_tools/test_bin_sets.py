import os
import pickle
import pickletools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import model_selection

from facedist import errors
from tfrecords_tools.sources import insightface_bin

IMAGES = [bytes([number]) * (5 + number) + b"\xff\xd8" for number in range(6)]
SAME = [True, False, True]


def arrays_of(images):
  return [np.frombuffer(image, np.uint8) for image in images]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
  ("images", "same"),
  [
    (IMAGES, SAME),
    (tuple(IMAGES), np.array(SAME)),
    (arrays_of(IMAGES), [int(flag) for flag in SAME]),
    (IMAGES, np.array(SAME, np.int64)),
    (IMAGES, np.array(SAME, ">i4")),
    (IMAGES, np.array(SAME, np.float32)),
    (IMAGES, list(np.array(SAME, np.float64))),
    (IMAGES, [float(flag) for flag in SAME]),
    (np.array([*IMAGES, None], object)[:6], [np.bool_(flag) for flag in SAME]),
  ],
)
def test_the_set_is_read_however_it_was_written(images, same, protocol):
  content = pickle.dumps((images, same), protocol=protocol)
  assert insightface_bin.parse(content, origin="x.bin") == (IMAGES, SAME)


def test_a_set_that_python_2_wrote_is_read():
  # pickle.dumps((["\xff1", "2"], [True]), 2) of Python 2.7: str is a SHORT_BINSTRING
  content = b"\x80\x02]q\x00(U\x02\xff1U\x012e]q\x01\x88a\x86q\x02."
  assert insightface_bin.parse(content, origin="x.bin") == ([b"\xff1", b"2"], [True])


def test_arrays_that_python_2_wrote_are_read():
  # As Python 2.7 pickles ([np.uint8 arrays], [bool]): every str is a SHORT_BINSTRING.
  array = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
    b"(I1\n(I2\ntcnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntb"
    b"I00\nU\x02%btb"
  )
  content = b"\x80\x02(](" + array % b"\xff1" + array % b"\xff2" + b"e](I01\net."
  assert insightface_bin.parse(content, origin="x.bin") == (
    [b"\xff1", b"\xff2"],
    [True],
  )


@pytest.mark.parametrize("protocol", range(6))
def test_an_image_without_a_byte_is_read(protocol):
  content = pickle.dumps(([b"", b"1"], [True]), protocol)
  assert insightface_bin.parse(content, origin="x.bin") == ([b"", b"1"], [True])


def test_bytes_made_of_a_number_are_refused():
  content = b"((c__builtin__\nbytes\n(I9999\ntRS'1'\nl(I01\nlt."
  with pytest.raises(errors.DataError, match="not one of InsightFace's"):
    insightface_bin.parse(content, origin="x.bin")


def test_pairs_are_neighbours_and_folds_are_runs(tmp_path):
  path = tmp_path / "set.bin"
  same = [number % 2 == 0 for number in range(23)]
  images = [bytes([number]) for number in range(46)]
  path.write_bytes(pickle.dumps((images, same)))
  found = insightface_bin.read(str(path))
  groups = list(found.groups)
  assert found.num_folds == 10
  assert found.pairs[:, :2].ravel().tolist() == list(range(46))
  assert found.pairs[:, 2].tolist() == same
  # sklearn's KFold(10) of 23: three folds of 3, then seven of 2
  assert np.bincount(found.pairs[:, 3]).tolist() == [3] * 3 + [2] * 7
  assert found.contents == images
  numbers = [int(row["start"]) for group in groups for row in group.rows]
  assert numbers == list(range(46))
  identity_of = [group.identity for group in groups for _ in range(len(group.paths))]
  for first, second, is_same, _ in found.pairs.tolist():
    assert (identity_of[first] == identity_of[second]) == is_same
  paths = [path for group in groups for path in group.paths]
  assert paths == sorted(paths)


@pytest.mark.parametrize("num_images", [12_000, 14_000])
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_sets_as_they_come_have_scikit_learns_folds(tmp_path, num_images, protocol):
  path = tmp_path / "set.bin"
  same = [pair // (num_images // 20) % 2 == 0 for pair in range(num_images // 2)]
  images = [np.frombuffer(b"%d" % number, np.uint8) for number in range(num_images)]
  path.write_bytes(pickle.dumps((images, same), protocol))
  found = insightface_bin.read(str(path))
  splits = model_selection.KFold(10, shuffle=False).split(np.zeros(len(same)))
  for fold, (_, test) in enumerate(splits):
    np.testing.assert_array_equal(np.flatnonzero(found.pairs[:, 3] == fold), test)
  assert found.contents[-1] == b"%d" % (num_images - 1)


class Hostile:
  """Runs a command when it is unpickled."""

  def __init__(self, target, *arguments):
    self.target, self.arguments = target, arguments

  def __reduce__(self):
    return self.target, self.arguments


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
  ("target", "argument", "name"),
  [
    (os.system, "touch {}", "posix.system|os.system|nt.system"),
    (eval, "open({!r}, 'w')", "eval"),
    (open, "{}", "open"),
    (np.save, "{}", "save"),
    (np.frombuffer, "{}", "frombuffer"),
  ],
)
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(
  tmp_path, protocol, target, argument, name
):
  touched = tmp_path / "touched"
  hostile = Hostile(target, argument.format(str(touched)))
  for value in (hostile, (IMAGES, [hostile]), ([hostile], SAME)):
    content = pickle.dumps(value, protocol=protocol)
    with pytest.raises(errors.DataError, match=f"x.bin: .*wants to run .*({name})"):
      insightface_bin.parse(content, origin="x.bin")
  assert not touched.exists()


def test_a_dtypes_state_cannot_make_addresses_of_bytes():
  # In NumPy itself this array's element is whatever lies at address 0x4141414141414141.
  class Dtype:
    def __reduce__(self):
      return np.dtype, ("O", False, True), (3, "|", None, None, None, 8, 8, 0)

  class Addresses:
    def __reduce__(self):
      state = (1, (2,), Dtype(), False, b"A" * 16)
      return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state

  content = pickle.dumps((Addresses(), [True]))
  with pytest.raises(errors.DataError, match="cannot create an OBJECT array"):
    insightface_bin.parse(content, origin="x.bin")


def test_a_pickle_cannot_change_what_stands_for_numpys_classes():
  # BUILD on the class itself: sets attributes where there is no __setstate__.
  before = {
    one: dict(vars(one)) for one in (insightface_bin._Array, insightface_bin._Dtype)
  }
  for name in (
    b"numpy\ndtype",
    b"numpy\nndarray",
    b"numpy.core.multiarray\n_reconstruct",
  ):
    content = b"c" + name + b"\n(NN(S'items'\nI1\ndtb."
    with pytest.raises(errors.DataError, match="not one of InsightFace's"):
      insightface_bin.parse(content, origin="x.bin")
  assert before == {one: dict(vars(one)) for one in before}


def test_a_pickle_that_asks_for_much_memory_is_refused():
  content = b"\x80\x02]r\xff\xff\xff\x7f."  # LONG_BINPUT 2147483647
  assert [name for name, *_ in pickletools.genops(content)][2].name == "LONG_BINPUT"
  with pytest.raises(errors.DataError, match="counts 2147483647 objects"):
    insightface_bin.parse(content, origin="x.bin")


@pytest.mark.parametrize(
  ("value", "reason"),
  [
    ((IMAGES, SAME[:2]), "6 images for 2 pairs"),
    (([], []), "0 images for 0 pairs"),
    ((IMAGES, SAME, 3), "int where a list was expected"),
    ({"images": IMAGES}, "str where a list was expected"),
    ((IMAGES, [True, False, "x"]), "where True or False was expected"),
    (([1, 2], [True]), "int where bytes were expected"),
    ((arrays_of(IMAGES), [2, 0, 1]), "2 where True or False was expected"),
    ((IMAGES, np.array([256, 0, 1])), "256 where True or False was expected"),
    ((IMAGES, np.array([0.5, 0, 1])), "0.5 where True or False was expected"),
    (([np.ones(3, np.float32)] * 2, [True]), "_Array where bytes were expected"),
    (([np.ones((3, 2), np.uint8)] * 2, [True]), "_Array where bytes were expected"),
  ],
)
def test_another_pickle_is_an_error(value, reason):
  with pytest.raises(errors.DataError, match=reason):
    insightface_bin.parse(pickle.dumps(value), origin="x.bin")


WHOLE = pickle.dumps((arrays_of(IMAGES), np.array(SAME)), protocol=2)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_a_corrupt_pickle_is_a_set_or_an_error(place, value):
  content = bytearray(WHOLE)
  content[place] = value
  for corrupt in (bytes(content), bytes(content[:place])):
    try:
      images, same = insightface_bin.parse(corrupt, origin="x.bin")
    except errors.DataError:
      continue
    assert len(images) == 2 * len(same)
