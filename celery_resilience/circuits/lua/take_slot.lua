-- ARGV: a name, a token, how many slots there are, and the seconds of a lease. Returns 1
-- if there was a slot, else 0.

local name, token, limit, lease_s = unpack(ARGV)
local key = KEYS[1] .. 'slots:' .. name
redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
if redis.call('ZCARD', key) >= tonumber(limit) then
  return 0
end
redis.call('ZADD', key, string.format('%.6f', now + lease_s), token)
redis.call('PEXPIRE', key, math.floor(lease_s * 1000) + 60000)
return 1
