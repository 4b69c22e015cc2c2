-- ARGV: for each message its id, the seconds until it is due, and its text.

for n = 1, #ARGV, 3 do
  redis.call('HSET', texts, ARGV[n], ARGV[n + 2])
  redis.call('ZADD', due, at(tonumber(ARGV[n + 1])), ARGV[n])
end
return 1
