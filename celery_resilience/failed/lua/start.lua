-- Ask for leave to run a replayed message. ARGV: record, token, copy.
-- Returns 1 for yes.

local id, token, copy = ARGV[1], ARGV[2], ARGV[3]
local facts = facts_of(id)
if not facts then return 1 end
local found = redis.call('HMGET', hash(id), 'token', 'copy')
if facts.state ~= 'replaying' or found[1] ~= token then return 0 end
if facts.phase == 'running' and found[2] ~= copy then return 0 end
change(id, facts, {'phase', 'running', 'copy', copy}, {})
return 1
