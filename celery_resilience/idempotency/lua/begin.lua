-- Take a key for one run. ARGV: a claim.
-- Returns the verdict, the epoch, the state before, its owner, for how long it has the
-- key, and what is remembered; of a key that was unknown the epoch alone.

local claim = claim_of(ARGV[1])
local hash = hash_of(claim.key)
local state, owner, token, holder, fingerprint, epoch, lease_until, found = unpack(
  redis.call('HMGET', hash, 'state', 'owner', 'token', 'holder', 'fingerprint',
    'epoch', 'lease_until', 'found'))
local is_mine = owner == claim.owner
local is_same = not state or claim.is_forced or has_same_arguments(claim, fingerprint)
local remaining_s = state and tonumber(lease_until) - now or 0

local function is_free()
  if not state or state == 'queued' then return true end
  if state == 'retrying' and is_mine then return true end
  if not is_same then return false end
  if state == 'done' then return claim.is_forced end
  if state == 'retrying' then return remaining_s <= 0 end
  if state == 'running' then
    return remaining_s <= 0
      or (is_mine and claim.dead_holder ~= '' and holder == claim.dead_holder)
  end
  return true
end

if is_free() then
  epoch = (epoch or 0) + 1
  lease_until = now + claim.lease_s
  redis.call('HSET', hash, 'state', 'running', 'owner', claim.owner,
    'token', claim.token, 'holder', claim.holder, 'fingerprint', claim.fingerprint,
    'epoch', epoch, 'begun_at', as_text(now), 'lease_until', as_text(lease_until),
    'expires_at', as_text(lease_until + claim.keep_s), 'found', state or '',
    'name', claim.name, 'task', claim.task, 'result_bytes', 0)
  if state then redis.call('HDEL', hash, 'result') end
  forget_at(claim.key, lease_until + claim.keep_s)
  if not state then return epoch end
  return {'run', epoch, state, '', '0', false}
end
if state == 'running' and token == claim.token then
  return {'run', tonumber(epoch), found, '', '0', false}
end
if not is_same then return {'mismatch', 0, state, owner, '0', false} end
if state == 'done' then
  return {'done', 0, state, owner, '0', redis.call('HGET', hash, 'result')}
end
return {'busy', 0, state, owner, as_text(remaining_s), false}
