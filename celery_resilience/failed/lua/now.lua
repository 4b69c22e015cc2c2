-- The wall time of Redis, in seconds.
return as_text(now())
