"""Snoozed messages wait in the store where a worker would hold too many of them."""
