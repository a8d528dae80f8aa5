"""Configurations: frozen dataclasses whose fields are a command's flags.

A command declares one frozen dataclass with `setting(...)` fields and hands it to
`run_command`, which defines a flag per field, parses, validates and calls `main`.
"""

from facedist.config.command import run_command, say_why
from facedist.config.common import CommonConfig
from facedist.config.fields import (
  conflicts,
  from_json,
  lookup,
  setting,
  subset,
  to_json,
  validate,
)
from facedist.config.parsing import define_flags, describe_flags, from_flags

__all__ = [
  "CommonConfig",
  "conflicts",
  "define_flags",
  "describe_flags",
  "from_flags",
  "from_json",
  "lookup",
  "run_command",
  "say_why",
  "setting",
  "subset",
  "to_json",
  "validate",
]
