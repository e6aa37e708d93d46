-- Read a bulkhead.  KEYS: permits, about, waiting.  ARGV: its base limit.   Returns {used, limit, waiting}, numbers as text.
local t = redis.call('TIME')
local now, used = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000), 0
for _, permit in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')) do
  used = used + tonumber(string.match(permit, '^[^|]*|[^|]*|([^|]*)|'))
end
return {tostring(used), redis.call('HGET', KEYS[2], 'limit') or ARGV[1], redis.call('ZCARD', KEYS[3])}
