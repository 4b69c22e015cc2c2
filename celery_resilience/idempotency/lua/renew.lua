-- Begin leases anew. ARGV: for each its key, token, seconds of lease and of keep.
-- Returns the keys whose lease is not that run's.

local lost = {}
for place = 1, #ARGV, 4 do
  local key, token, lease_s, keep_s = unpack(ARGV, place, place + 3)
  local hash = hash_of(key)
  local found = redis.call('HMGET', hash, 'state', 'token')
  if found[1] == 'running' and found[2] == token then
    local lease_until = now + lease_s
    redis.call('HSET', hash, 'lease_until', as_text(lease_until),
      'expires_at', as_text(lease_until + keep_s))
    forget_at(key, lease_until + keep_s)
  else
    lost[#lost + 1] = key
  end
end
return lost
