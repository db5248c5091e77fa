"""Batch files: requests of a file, answered in the background and kept in SQLite so that a restart loses nothing."""
