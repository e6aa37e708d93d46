-- uses: clock
-- Read a bulkhead.  KEYS: permits, about, waiting.  ARGV: its base limit, its kind.
-- Returns {used as text, limit as text, number of waiters}.
local now, used = now_ms(), 0
for _, permit in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')) do
  used = used + tonumber(string.match(permit, '^[^|]*|[^|]*|([^|]*)|'))
end
local limit = ARGV[2] ~= 'fixed' and redis.call('HGET', KEYS[2], 'limit') or ARGV[1]
return {tostring(used), limit, redis.call('ZCARD', KEYS[3])}
