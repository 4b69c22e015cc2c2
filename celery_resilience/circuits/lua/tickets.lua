-- ARGV: a name, a generation, how many are taken, and the milliseconds for which they are
-- remembered. Returns the first of them.

local name, generation, count, kept_ms = unpack(ARGV)
local key = KEYS[1] .. 'tickets:' .. generation .. ':' .. name
local last = redis.call('INCRBY', key, count)
redis.call('PEXPIRE', key, kept_ms)
return last - count
