-- Nobody waits for a message any more. ARGV: its key and its owner.

local hash = hash_of(ARGV[1])
local found = redis.call('HMGET', hash, 'state', 'owner', 'token')
if found[1] ~= 'queued' and found[1] ~= 'retrying' then return end
if found[2] ~= ARGV[2] then return end
if found[3] == '' then
  redis.call('DEL', hash)
else
  -- A run of it has ended, and not in success.
  redis.call('HSET', hash, 'state', 'failed', 'lease_until', as_text(now))
end
