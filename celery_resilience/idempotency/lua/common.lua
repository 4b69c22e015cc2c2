-- What every script of this folder begins with: one hash for a key, which Redis
-- itself forgets. Times are seconds of Redis's clock, the same in a whole script.

local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000

local function as_text(seconds)
  return string.format('%.6f', seconds)
end

local function hash_of(key)
  return KEYS[1] .. 'key:' .. key
end

-- Redis keeps a key for the whole millisecond in which it expires.
local function forget_at(key, at)
  redis.call('PEXPIREAT', hash_of(key), string.format('%.0f', math.floor(at * 1000) - 1))
end

-- A claim's fields, each ended by a NUL, which none of them holds.
local function claim_of(text)
  local fields = {}
  for field in string.gmatch(text, '([^%z]*)%z') do fields[#fields + 1] = field end
  return {
    key = fields[1], name = fields[2], task = fields[3], owner = fields[4],
    token = fields[5], holder = fields[6], fingerprint = fields[7],
    lease_s = tonumber(fields[8]), keep_s = tonumber(fields[9]),
    dead_holder = fields[10], is_forced = fields[11] == '1',
  }
end

local function has_same_arguments(claim, fingerprint)
  return fingerprint == '' or claim.fingerprint == '' or fingerprint == claim.fingerprint
end

