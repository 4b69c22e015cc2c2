-- What every script of this folder begins with: a failed task's hash, and the
-- indexes and counters that follow it. Scores are negative times: last failed first.

local prefix = KEYS[1]

local INDEXED = {
  'state', 'phase', 'reason', 'task', 'task_id', 'exception', 'failed_queue',
  'first_failed_at', 'last_failed_at', 'claimed_at', 'settled_at', 'size',
}
local COUNTED = {'reason', 'task', 'exception', 'failed_queue'}

local function now()
  local time = redis.call('TIME')
  return time[1] + time[2] / 1000000
end

local function as_text(number)
  return string.format('%.17g', number)
end

local function hash(id)
  return prefix .. 'task:' .. id
end

-- What the indexes know of a failed task, or nil where there is none.
local function facts_of(id)
  local values = redis.call('HMGET', hash(id), unpack(INDEXED))
  if not values[1] then return nil end
  local facts = {}
  for place, name in ipairs(INDEXED) do
    facts[name] = values[place] or nil
  end
  return facts
end

-- The success of a redelivery that was collected before its failure.
local function is_ghost(facts)
  return facts.reason == ''
end

local function add_to(name, field, number)
  if redis.call('HINCRBY', prefix .. name, field, number) == 0 then
    redis.call('HDEL', prefix .. name, field)
  end
end

local function put_in(name, score, member, is_there)
  if is_there then
    redis.call('ZADD', prefix .. name, score, member)
  else
    redis.call('ZREM', prefix .. name, member)
  end
end

local function follow(id, facts, is_there)
  if is_ghost(facts) then
    put_in('ghosts', facts.settled_at, id, is_there)
    return
  end
  local by = is_there and 1 or -1
  local at = as_text(-tonumber(facts.last_failed_at))
  put_in('at', at, id, is_there)
  put_in('state:' .. facts.state, at, id, is_there)
  put_in('ids', 0, id, is_there)
  put_in('task_ids', 0, facts.task_id .. '\0' .. id, is_there)
  add_to('count', facts.failed_queue, by)
  add_to('size', facts.failed_queue, by * tonumber(facts.size))
  if facts.state == 'unresolved' then
    put_in('first', facts.first_failed_at, id, is_there)
    for _, name in ipairs(COUNTED) do
      add_to('unresolved:' .. name, facts[name], by)
    end
  end
  if facts.phase == 'claimed' then
    put_in('claimed', facts.claimed_at, id, is_there)
  end
end

-- Set and unset fields; *before* is what facts_of said, or nil for a new one.
local function change(id, before, set, unset)
  if before then follow(id, before, false) end
  redis.call('HSET', hash(id), unpack(set))
  if #unset > 0 then redis.call('HDEL', hash(id), unpack(unset)) end
  redis.call('HINCRBY', hash(id), 'revision', 1)
  follow(id, facts_of(id), true)
end

local function forget(id, facts)
  follow(id, facts, false)
  redis.call('DEL', hash(id))
end

