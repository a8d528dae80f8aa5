"""Measures facedist against the least that its work can cost; see RESULTS.md."""

import facedist  # noqa: F401  quiets TensorFlow, before any benchmark imports it
