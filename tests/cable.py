"""A long and thin cable: `python cable.py INTERFACE NAMESPACE MILLISECONDS MEGABITS`.

Makes two interfaces, INTERFACE here and eth0 in the network namespace, and carries each
frame from one to the other: late by so many milliseconds, and no more than so many
megabits a second each way, until its input ends. It is what `tc netem` does, which not
every kernel has.
"""

import collections
import ctypes
import fcntl
import os
import select
import struct
import sys
import time

_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_CLONE_NEWNET = 0x40000000
_MAX_FRAME_BYTES = 65536
_MAX_FRAMES_ON_THE_WAY = 2000  # a router drops what comes beyond its queue


def open_interface(name: str) -> int:
  """Makes an interface in this thread's namespace; returns its file descriptor."""
  descriptor = os.open("/dev/net/tun", os.O_RDWR)
  fcntl.ioctl(
    descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _TAP_WITHOUT_HEADER)
  )
  return descriptor


def go_into(namespace: str) -> None:
  """Moves this process into a network namespace."""
  with open(namespace) as handle:
    if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET):
      raise OSError(ctypes.get_errno(), "setns")


def carry(ends: tuple[int, int], *, delay: float, bytes_per_second: float) -> None:
  """Carries frames both ways until the input ends; `delay` in seconds."""
  others = dict(zip(ends, reversed(ends), strict=True))
  queues = {end: collections.deque[tuple[float, bytes]]() for end in ends}
  free = dict.fromkeys(ends, 0.0)  # when the cable has carried all before
  while True:
    due = [queue[0][0] for queue in queues.values() if queue]
    wait = max(0.0, min(due) - time.monotonic()) if due else None
    readable, _, _ = select.select([*ends, sys.stdin], (), (), wait)
    if sys.stdin in readable:
      return
    now = time.monotonic()
    for end in readable:
      frame = os.read(end, _MAX_FRAME_BYTES)
      free[end] = max(now, free[end]) + len(frame) / bytes_per_second
      if len(queues[end]) < _MAX_FRAMES_ON_THE_WAY:
        queues[end].append((free[end] + delay, frame))
    for end, queue in queues.items():
      while queue and queue[0][0] <= now:
        try:
          os.write(others[end], queue.popleft()[1])
        except OSError:  # that end is down
          continue


def main() -> None:
  """Makes the cable, says so, and carries."""
  interface, namespace, milliseconds, megabits = sys.argv[1:]
  here = open_interface(interface)
  go_into(namespace)
  there = open_interface("eth0")
  print("ready", flush=True)
  carry(
    (here, there),
    delay=float(milliseconds) / 1000,
    bytes_per_second=float(megabits) * 1e6 / 8,
  )


if __name__ == "__main__":
  main()
