-- What every script of this folder begins with. `due`: the ids by their time, or that of
-- the lapse of their claim; `texts`: the messages by their ids.

local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local due = KEYS[1] .. 'due'
local texts = KEYS[1] .. 'texts'

local function at(seconds)
  return string.format('%.6f', now + seconds)
end

