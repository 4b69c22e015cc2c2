-- Say what a run came to.
-- ARGV: its claim, the state, seconds for which the key waits for its owner,
-- '1' where something is to be remembered, and that.
-- Returns the owner of another run, which has the key now.

local claim = claim_of(ARGV[1])
local state, until_s, has_result, result = unpack(ARGV, 2, 5)
local hash = hash_of(claim.key)
local found = redis.call('HMGET', hash, 'token', 'owner')
local token = found[1]

-- One that only a sender has touched has no token.
if token and token ~= '' and token ~= claim.token then return found[2] end

local lease_until = now + until_s
local expires_at = lease_until + claim.keep_s
-- Also whose it is: a sender may have reserved it since.
redis.call('HSET', hash, 'state', state, 'owner', claim.owner,
  'holder', claim.holder, 'fingerprint', claim.fingerprint,
  'lease_until', as_text(lease_until), 'expires_at', as_text(expires_at),
  'result_bytes', #result)
if has_result == '1' then
  redis.call('HSET', hash, 'result', result)
else
  redis.call('HDEL', hash, 'result')
end
if token ~= claim.token then
  redis.call('HSET', hash, 'token', claim.token, 'epoch', 1,
    'begun_at', as_text(now), 'found', '', 'name', claim.name, 'task', claim.task)
end
forget_at(claim.key, expires_at)
return false
