-- What every script of this folder begins with: one hash for a circuit.

local time = redis.call('TIME')
local now = string.format('%.6f', time[1] + time[2] / 1000000)

local function hash_of(name)
  return KEYS[1] .. 'circuit:' .. name
end

local function circuit(name)
  local found = redis.call('HMGET', hash_of(name), 'version', 'text')
  return {found[1] or '', found[2] or ''}
end

