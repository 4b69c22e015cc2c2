-- Forget a key. ARGV: the key, and '1' if it may be running.
-- Returns 1 if it was there, and is forgotten.

local hash = hash_of(ARGV[1])
local found = redis.call('HMGET', hash, 'state', 'lease_until')
if ARGV[2] ~= '1' and found[1] == 'running' and tonumber(found[2]) > now then return 0 end
return redis.call('DEL', hash)
