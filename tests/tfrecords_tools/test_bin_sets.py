import os
import pickle

import numpy as np
import pytest
from sklearn import model_selection

from facedist import errors
from tfrecords_tools.sources import insightface_bin

IMAGES = [bytes([number]) * (5 + number) + b"\xff\xd8" for number in range(6)]
SAME = [True, False, True]


ARRAYS = [np.frombuffer(image, np.uint8) for image in IMAGES]


def parse(content):
  """Returns images and flags of a .bin file's content, or of what is pickled to it."""
  if not isinstance(content, bytes):
    content = pickle.dumps(content)
  return insightface_bin.parse(content, origin="x.bin")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
  ("images", "same"),
  [
    (IMAGES, SAME),
    (tuple(IMAGES), np.array(SAME)),
    (ARRAYS, [int(flag) for flag in SAME]),
    *((IMAGES, np.array(SAME, kind)) for kind in (np.int64, ">i4", np.float32)),
    (IMAGES, list(np.array(SAME, np.float64))),
    (IMAGES, [float(flag) for flag in SAME]),
    (np.array([*IMAGES, None], object)[:6], [np.bool_(flag) for flag in SAME]),
  ],
)
def test_the_set_is_read_however_it_was_written(images, same, protocol):
  assert parse(pickle.dumps((images, same), protocol)) == (IMAGES, SAME)
  assert parse(pickle.dumps(([b"", b"1"], [True]), protocol)) == ([b"", b"1"], [True])


def test_a_set_that_python_2_wrote_is_read():
  # pickle.dumps((["\xff1", "2"], [True]), 2) of Python 2.7: str is a SHORT_BINSTRING
  content = b"\x80\x02]q\x00(U\x02\xff1U\x012e]q\x01\x88a\x86q\x02."
  assert parse(content) == ([b"\xff1", b"2"], [True])


def test_arrays_that_python_2_wrote_are_read():
  # As Python 2.7 pickles ([np.uint8 arrays], [bool]): every str is a SHORT_BINSTRING.
  array = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
    b"(I1\n(I2\ntcnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntb"
    b"I00\nU\x02%btb"
  )
  content = b"\x80\x02(](" + array % b"\xff1" + array % b"\xff2" + b"e](I01\net."
  assert parse(content) == ([b"\xff1", b"\xff2"], [True])


@pytest.mark.parametrize("num_pairs", [23, 6_000, 7_000])
@pytest.mark.parametrize("protocol", [2, 4])
def test_pairs_are_neighbours_and_folds_are_scikit_learns(
  tmp_path, num_pairs, protocol
):
  same = [pair // (num_pairs // 10) % 2 == 0 for pair in range(num_pairs)]
  images = [b"%d" % number for number in range(2 * num_pairs)]
  arrays = [np.frombuffer(image, np.uint8) for image in images]
  (tmp_path / "set.bin").write_bytes(pickle.dumps((arrays, same), protocol))
  found = insightface_bin.read(str(tmp_path / "set.bin"))
  assert found.contents == images
  assert found.num_folds == 10
  assert found.pairs[:, :2].ravel().tolist() == list(range(2 * num_pairs))
  assert found.pairs[:, 2].tolist() == same
  splits = model_selection.KFold(10, shuffle=False).split(np.zeros(num_pairs))
  for fold, (_, test) in enumerate(splits):
    np.testing.assert_array_equal(np.flatnonzero(found.pairs[:, 3] == fold), test)
  groups = list(found.groups)
  numbers = [int(row["start"]) for group in groups for row in group.rows]
  assert numbers == list(range(2 * num_pairs))
  identity_of = [group.identity for group in groups for _ in group.paths]
  for first, second, is_same, _ in found.pairs.tolist():
    assert (identity_of[first] == identity_of[second]) == is_same
  paths = [path for group in groups for path in group.paths]
  assert paths == sorted(paths)


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
    with pytest.raises(errors.DataError, match=f"x.bin: .*wants to run .*({name})"):
      parse(pickle.dumps(value, protocol))
  assert not touched.exists()


class Addresses:
  """An array whose element is, in NumPy itself, whatever lies at a chosen address."""

  class Dtype:
    def __reduce__(self):
      return np.dtype, ("O", False, True), (3, "|", None, None, None, 8, 8, 0)

  def __reduce__(self):
    state = (1, (2,), self.Dtype(), False, b"A" * 16)
    return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state


def test_a_pickle_cannot_change_what_stands_for_numpys_classes():
  # BUILD on the class itself: sets attributes where there is no __setstate__.
  stand_ins = (insightface_bin._Array, insightface_bin._Dtype)
  before = [dict(vars(one)) for one in stand_ins]
  reconstruct = b"numpy.core.multiarray\n_reconstruct"
  for name in (b"numpy\ndtype", b"numpy\nndarray", reconstruct):
    with pytest.raises(errors.DataError, match="not one of InsightFace's"):
      parse(b"c" + name + b"\n(NN(S'items'\nI1\ndtb.")
  assert before == [dict(vars(one)) for one in stand_ins]


@pytest.mark.parametrize(
  ("value", "reason"),
  [
    ((IMAGES, SAME[:2]), "6 images for 2 pairs"),
    (([], []), "0 images for 0 pairs"),
    ((IMAGES, SAME, 3), "int where a list was expected"),
    ({"images": IMAGES}, "str where a list was expected"),
    ((IMAGES, [True, False, "x"]), "where True or False was expected"),
    (([1, 2], [True]), "int where bytes were expected"),
    ((ARRAYS, [2, 0, 1]), "2 where True or False was expected"),
    ((IMAGES, np.array([256, 0, 1])), "256 where True or False was expected"),
    ((IMAGES, np.array([0.5, 0, 1])), "0.5 where True or False was expected"),
    (([np.ones(3, np.float32)] * 2, [True]), "_Array where bytes were expected"),
    (([np.ones((3, 2), np.uint8)] * 2, [True]), "_Array where bytes were expected"),
    ((Addresses(), [True]), "cannot create an OBJECT array"),
    (b"((c__builtin__\nbytes\n(I9999\ntRS'1'\nl(I01\nlt.", "not one of InsightFace's"),
    (b"\x80\x02]r\xff\xff\xff\x7f.", "counts 2147483647 objects"),  # LONG_BINPUT
  ],
)
def test_another_pickle_is_an_error(value, reason):
  with pytest.raises(errors.DataError, match=reason):
    parse(value)
