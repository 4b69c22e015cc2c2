-- A run of a redelivered message starts.
-- ARGV: the message, '1' if it runs alone or '0', its worker, seconds it is kept.

local time = redis.call('TIME')
local starts = KEYS[1] .. 'message:' .. ARGV[1]
local worker = KEYS[1] .. 'worker:' .. ARGV[3]
redis.call('RPUSH', starts, ARGV[2] .. ' ' .. time[1] .. ' ' .. ARGV[3])
redis.call('EXPIRE', starts, ARGV[4])
redis.call('SADD', worker, ARGV[1])
redis.call('EXPIRE', worker, ARGV[4])
