-- The starts of a message that never ended, oldest first: '1' for one that ran alone.
-- ARGV: the message, seconds after which a start is forgotten.

local oldest = redis.call('TIME')[1] - ARGV[2]
local found = {}
for _, start in ipairs(redis.call('LRANGE', KEYS[1] .. 'message:' .. ARGV[1], 0, -1)) do
  local alone, at = string.match(start, '^(%d) (%d+) ')
  if tonumber(at) > oldest then found[#found + 1] = alone end
end
return found
