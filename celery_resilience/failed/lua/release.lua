-- Nothing was sent for a claim: its record is unresolved again.
-- ARGV: its id, its token, and why.

local facts = facts_of(ARGV[1])
if facts and facts.phase == 'claimed'
    and redis.call('HGET', hash(ARGV[1]), 'token') == ARGV[2] then
  change(
    ARGV[1], facts, {'state', 'unresolved', 'note', ARGV[3]}, {'phase', 'token', 'copy'}
  )
end
