"""A message that is too large, or cannot be serialised, is refused where it is sent."""
