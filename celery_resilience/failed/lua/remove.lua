-- Forget failed tasks that are still as they were read.
-- ARGV: ids, each with the revision that was read. Returns the ids forgotten.

local forgotten = {}
for place = 1, #ARGV, 2 do
  local id = ARGV[place]
  local facts = facts_of(id)
  if facts and redis.call('HGET', hash(id), 'revision') == ARGV[place + 1] then
    forget(id, facts)
    forgotten[#forgotten + 1] = id
  end
end
return forgotten
