-- Take one retry from a budget, now or in advance, as `retries/store.py` says.
-- ARGV: the budget's name, the most that it saves, what it gains a second, what first
-- attempts have added, and the most seconds in advance. Returns 1 if there was one, and
-- the seconds until it may run; else 0, and those until the next question.

local key = KEYS[1] .. 'budget:' .. ARGV[1]
local most, per_s = tonumber(ARGV[2]), tonumber(ARGV[3])
local added, max_wait_s = tonumber(ARGV[4]), tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

local found = redis.call('HMGET', key, 'tokens', 'at')
local tokens = tonumber(found[1] or most)
local at = tonumber(found[2] or now)
tokens = math.min(most, tokens + added + math.max(0, now - at) * per_s)

local granted, wait_s, left = 1, 0, tokens - 1
if left < -max_wait_s * per_s then
  granted, wait_s, left = 0, max_wait_s, tokens
elseif left < 0 then
  wait_s = -left / per_s
end
redis.call('HSET', key, 'tokens', string.format('%.6f', left),
  'at', string.format('%.6f', math.max(now, at)))
-- Then it is full, as one that nobody knows is.
redis.call('PEXPIRE', key, math.ceil((most - left) / per_s * 1000) + 60000)
return {granted, string.format('%.6f', wait_s)}
