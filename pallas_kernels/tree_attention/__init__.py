"""Attention of new tokens over a committed cache and, by packed bits, over each other."""
