-- The broker has the messages of these claims.
-- ARGV: for each its id, the claim's number, and the message's new task id or ''.

for place = 1, #ARGV, 3 do
  local id = ARGV[place]
  local facts = facts_of(id)
  -- By number, for its worker may have answered already.
  if facts and redis.call('HGET', hash(id), 'number') == ARGV[place + 1] then
    local set = {'replays', redis.call('HINCRBY', hash(id), 'replays', 1)}
    local unset = {}
    if facts.phase == 'claimed' then
      set[3] = 'phase'
      set[4] = 'sent'
    end
    if ARGV[place + 2] == '' then
      unset[1] = 'replayed_as'
    else
      set[#set + 1] = 'replayed_as'
      set[#set + 1] = ARGV[place + 2]
    end
    change(id, facts, set, unset)
  end
end
