-- Claims whose owner died before it sent them; taking one makes it young again.
-- ARGV: seconds, and how many at most. Returns their ids.

local moment = now()
local old = as_text(moment - ARGV[1])
local ids = redis.call(
  'ZRANGE', prefix .. 'claimed', '-inf', '(' .. old, 'BYSCORE', 'LIMIT', 0, ARGV[2]
)
for _, id in ipairs(ids) do
  change(id, facts_of(id), {'claimed_at', as_text(moment)}, {})
end
return ids
