"""A task that kills its process is stopped after N runs; its neighbours are not blamed.

A dead child's runs are counted by the main process, in a mark on the message
that it sends again. Starts of redelivered messages are counted in the store,
because a dead worker can count nothing. A suspect runs alone before a verdict.
"""
