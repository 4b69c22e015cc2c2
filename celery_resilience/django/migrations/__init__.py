"""Migrations of the table of `once`."""
