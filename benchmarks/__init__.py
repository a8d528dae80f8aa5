"""Measures facedist against the least that its work can cost; see RESULTS.md."""
