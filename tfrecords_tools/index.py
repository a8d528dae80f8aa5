"""The former name of `tfrecords_tools.rebuild_index`, which scripts may still call."""

from tfrecords_tools.rebuild_index import run

if __name__ == "__main__":
  run()
