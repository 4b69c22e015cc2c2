"""Sessions: the next task never inherits a broken transaction or a dead connection."""
