"""The same key has its effect once.

A key names an effect. One run at a time has it, by a lease that its process renews;
what it came to is remembered, and a duplicate gets that instead of a run of its own.
"""
