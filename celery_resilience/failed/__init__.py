"""A final failure is kept, shown and replayed.

capture (worker's main process) → failed queue or spool → collector → store →
list, show, replay.
"""
