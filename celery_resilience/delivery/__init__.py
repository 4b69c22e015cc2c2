"""One outcome for each delivery.

Whatever happens to a message, the worker's main process settles it exactly
once, and stores what must be stored before it is acknowledged.
"""
