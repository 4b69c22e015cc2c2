-- ARGV: a name, the version that was seen, the new version, its text, and the
-- milliseconds for which it is kept. Returns Redis's time, and what is stored now.

local name, seen, version, text, kept_ms = unpack(ARGV)
if circuit(name)[1] == seen then
  redis.call('HSET', hash_of(name), 'version', version, 'text', text)
  redis.call('PEXPIRE', hash_of(name), kept_ms)
end
return {now, circuit(name)}
