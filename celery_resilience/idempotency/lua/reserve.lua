-- Reserve a key for a message. ARGV: a claim.
-- Returns the owner of a message that waits already.

local claim = claim_of(ARGV[1])
local hash = hash_of(claim.key)
local state, owner, fingerprint, lease_until, expires_at = unpack(
  redis.call('HMGET', hash, 'state', 'owner', 'fingerprint', 'lease_until', 'expires_at'))
local is_mine = owner == claim.owner
local is_same = not state or has_same_arguments(claim, fingerprint)
local is_live = state and tonumber(lease_until) > now

if is_live and is_same and not is_mine and (state == 'queued' or state == 'retrying') then
  return owner
end

local is_free = not state
  or (state == 'queued' and (is_mine or not is_live))
  or (is_same and (state == 'failed' or (state == 'retrying' and not is_live)))
if not is_free then return false end

-- The token stays that of the last run: nobody has begun since.
lease_until = now + claim.lease_s
expires_at = math.max(lease_until, tonumber(expires_at or 0))
redis.call('HSET', hash, 'state', 'queued', 'owner', claim.owner,
  'holder', claim.holder, 'fingerprint', claim.fingerprint, 'begun_at', as_text(now),
  'lease_until', as_text(lease_until), 'expires_at', as_text(expires_at),
  'name', claim.name, 'task', claim.task, 'result_bytes', 0)
if not state then
  redis.call('HSET', hash, 'token', '', 'epoch', 0, 'found', '')
end
forget_at(claim.key, expires_at)
return false
