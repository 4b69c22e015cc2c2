-- ARGV: ids.

for _, id in ipairs(ARGV) do
  redis.call('ZREM', due, id)
  redis.call('HDEL', texts, id)
end
return 1
