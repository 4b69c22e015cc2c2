-- Write failed tasks that nobody else has written since they were read.
-- ARGV: seconds that a ghost is kept; then for each its id, the revision that was
-- read ('' for none), how many words set, those, how many fields unset, those.
-- Returns the ids that somebody else wrote.

local others = {}
local place = 2
while place <= #ARGV do
  local id, revision = ARGV[place], ARGV[place + 1]
  local set, unset = {}, {}
  place = place + 2
  for i = 1, ARGV[place] do set[i] = ARGV[place + i] end
  place = place + 1 + #set
  for i = 1, ARGV[place] do unset[i] = ARGV[place + i] end
  place = place + 1 + #unset
  if (redis.call('HGET', hash(id), 'revision') or '') == revision then
    change(id, facts_of(id), set, unset)
  else
    others[#others + 1] = id
  end
end

local old = as_text(now() - ARGV[1])
for _, id in ipairs(redis.call('ZRANGE', prefix .. 'ghosts', '-inf', '(' .. old, 'BYSCORE')) do
  forget(id, facts_of(id))
end
return others
