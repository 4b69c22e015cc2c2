"""Circuits: a broken dependency is left alone for a while, by the whole fleet."""
