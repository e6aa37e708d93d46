-- Add a node's counts to those of its operation.
-- KEYS: names of operations (SET), the operation's counts (HASH).
-- ARGV: operation, done, failed, busy_us, memory_kb, ttl_s, version.   Returns 1.
redis.call('SADD', KEYS[1], ARGV[1])
for i, field in ipairs({'done', 'failed', 'busy_us', 'memory_kb'}) do
  if ARGV[i + 1] ~= '0' then redis.call('HINCRBY', KEYS[2], field, ARGV[i + 1]) end
end
redis.call('HINCRBY', KEYS[2], 'nodes', 1)
local set = {'version', ARGV[7]}
local known = redis.call('HMGET', KEYS[2], 'peak_kb', 'lately_kb')
for i, field in ipairs({'peak_kb', 'lately_kb'}) do  -- ever, and since the last snapshot
  if tonumber(ARGV[5]) > (tonumber(known[i] or '0') or 0) then
    set[#set + 1] = field
    set[#set + 1] = ARGV[5]
  end
end
redis.call('HSET', KEYS[2], unpack(set))
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[6]) end
return 1
