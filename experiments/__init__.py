"""Thin scripts over the library."""
