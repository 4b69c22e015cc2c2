-- Take unresolved failed tasks for a replay.
-- ARGV: another queue or '', '1' for a new task id or '0', '1' if it is forced or '0',
-- then ids, each with the token of its replay. Returns the ids that were taken.

local taken = {}
local claimed_at = as_text(now())
for place = 4, #ARGV, 2 do
  local id, token = ARGV[place], ARGV[place + 1]
  local facts = facts_of(id)
  if facts and facts.state == 'unresolved' and not is_ghost(facts) then
    redis.call('HINCRBY', hash(id), 'number', 1)
    local set = {
      'state', 'replaying', 'phase', 'claimed', 'token', token,
      'claimed_at', claimed_at, 'wants_new_id', ARGV[2],
      'is_forced', ARGV[3],
    }
    local unset = {'copy', 'note'}
    if ARGV[1] == '' then
      unset[3] = 'to_queue'
    else
      set[#set + 1] = 'to_queue'
      set[#set + 1] = ARGV[1]
    end
    change(id, facts, set, unset)
    taken[#taken + 1] = id
  end
end
return taken
