"""Functions compiled by XLA, and whether the code at hand is traced for one."""

import contextvars
from collections.abc import Callable
from typing import Any

import tensorflow as tf

_is_tracing = contextvars.ContextVar("is_tracing", default=False)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a tf.function of `function` that XLA compiles; without AutoGraph."""

  def traced(*arguments: Any) -> Any:
    token = _is_tracing.set(True)
    try:
      return function(*arguments)
    finally:
      _is_tracing.reset(token)

  return tf.function(traced, jit_compile=True, autograph=False)


def is_tracing() -> bool:
  """Whether the caller is traced for XLA, which lacks some of TensorFlow's kernels."""
  return _is_tracing.get()
