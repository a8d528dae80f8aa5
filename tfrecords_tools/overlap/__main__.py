"""Runs `tfrecords_tools.find_overlap` under its former name."""

from tfrecords_tools.find_overlap import run

if __name__ == "__main__":
  run()
