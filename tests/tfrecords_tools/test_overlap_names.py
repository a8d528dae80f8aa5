import pytest

from tfrecords_tools.sources import lfw


@pytest.mark.parametrize(
  ("one", "other"),
  [
    ("A._J._Lamas", "AJ_Lamas"),
    ("Aaron_Tippin", "aaron tippin"),
    ("Julio_César_Chávez,_Jr.", "Julio_Cesar_Chavez_Jr"),
    ("Abdüllatif_Şener", "Abdullatif_Sener"),
  ],
)
def test_spellings_of_one_name_are_the_same(one, other):
  assert lfw.normalise(one) == lfw.normalise(other)


def test_different_names_are_not_the_same():
  assert lfw.normalise("Kim_Il") != lfw.normalise("Kim_Jong-Il")


@pytest.mark.parametrize(
  "text",
  [
    "10\t300\nAl_Gore\t1\t2\nAaron_Tippin\t1\tCher\t12\n",  # pairs.txt
    "3\nAl_Gore\t1\nAaron_Tippin\t1\nCher\t12\n",  # people.txt
    "Al_Gore\nAaron_Tippin\nCher\n",
  ],
)
def test_people_are_read_from_each_of_lfws_lists(tmp_path, text):
  path = tmp_path / "list.txt"
  path.write_text(text)
  people = lfw.read_people(str(path))
  assert people == {"Al_Gore", "Aaron_Tippin", "Cher"}
  names = {"n000021": "Aaron_Tippin", "n000002": "A_Fine_Frenzy", "n9": "Al_Gore"}
  assert lfw.overlapping(names, people) == ("n000021", "n9")
