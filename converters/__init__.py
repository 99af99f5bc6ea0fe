"""Weights between Hugging Face formats and ours: name tables, readers, writers, and the command line."""
