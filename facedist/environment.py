"""The environment variables that carry a command's settings to what it starts.

A flag that every command has is written here as a variable, so that spawned processes
and libraries deep below find it without a parameter through all layers.
"""

STORAGE_ENDPOINT = "FACEDIST_STORAGE_ENDPOINT"
STORAGE_USER_PROJECT = "FACEDIST_STORAGE_USER_PROJECT"
STORAGE_DEADLINE_SECONDS = "FACEDIST_STORAGE_DEADLINE_SECONDS"
DEFAULT_STORAGE_DEADLINE_SECONDS = 300.0
