-- Add a node's counts to those of its operation.
-- KEYS: names of operations (SET), the operation's counts (HASH).
-- ARGV: operation, done, failed, busy_us, memory_kb, ttl_s, version.   Returns 1.
redis.call('SADD', KEYS[1], ARGV[1])
for i, field in ipairs({'done', 'failed', 'busy_us', 'memory_kb'}) do
  redis.call('HINCRBY', KEYS[2], field, ARGV[i + 1])
end
redis.call('HINCRBY', KEYS[2], 'nodes', 1)
for _, field in ipairs({'peak_kb', 'lately_kb'}) do  -- ever, and since the last snapshot
  local peak = tonumber(redis.call('HGET', KEYS[2], field) or '0') or 0
  if tonumber(ARGV[5]) > peak then redis.call('HSET', KEYS[2], field, ARGV[5]) end
end
redis.call('HSET', KEYS[2], 'version', ARGV[7])
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[6]) end
return 1
