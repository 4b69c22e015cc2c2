-- Forget the starts in a worker. ARGV: the worker.

local worker = KEYS[1] .. 'worker:' .. ARGV[1]
for _, message in ipairs(redis.call('SMEMBERS', worker)) do
  local starts = KEYS[1] .. 'message:' .. message
  for _, start in ipairs(redis.call('LRANGE', starts, 0, -1)) do
    if string.match(start, '^%d %d+ (.*)$') == ARGV[1] then
      redis.call('LREM', starts, 0, start)
    end
  end
end
redis.call('DEL', worker)
