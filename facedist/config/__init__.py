"""Configurations: frozen dataclasses whose fields are a command's flags.

A command declares one frozen dataclass with `setting(...)` fields and hands it to
`run_command`, which defines a flag per field, parses, validates and calls `main`.
"""

from facedist.config.flags import (
  CommonConfig,
  conflicts,
  define_flags,
  describe_flags,
  from_flags,
  from_json,
  lookup,
  run_command,
  say_why,
  setting,
  subset,
  to_json,
  validate,
)

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
