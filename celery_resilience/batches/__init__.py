"""Many items in bounded memory, from where an earlier run stopped."""
