-- ARGV: how many, and the seconds of their claim. Returns how many others there are, the
-- seconds until the next of them or '', and then id and text of each that is claimed.

local limit, lease_s = tonumber(ARGV[1]), tonumber(ARGV[2])
local found = {}
local ids = redis.call('ZRANGEBYSCORE', due, '-inf', at(0), 'LIMIT', 0, limit)
for _, id in ipairs(ids) do
  local text = redis.call('HGET', texts, id)
  if text then
    redis.call('ZADD', due, at(lease_s), id)
    table.insert(found, id)
    table.insert(found, text)
  else
    redis.call('ZREM', due, id)
  end
end
local next = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')[2]
local next_s = next and string.format('%.6f', tonumber(next) - now) or ''
return {redis.call('ZCARD', due) - #found / 2, next_s, unpack(found)}
