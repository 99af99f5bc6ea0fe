"""Weights between Hugging Face formats and ours: name tables, readers, writers, and the command line."""

# `jetspec_jax.pretrained` imports us: loading the library first makes every order of imports work.
import jetspec_jax  # noqa: F401
