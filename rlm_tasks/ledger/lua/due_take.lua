-- uses: clock
-- Take jobs that want a sweep now, so that one worker sweeps each.  KEYS[1]: index of due jobs.
-- ARGV: ms after which another worker may take them, at most.   Returns their ids.
local now = now_ms()
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[2])
for _, job in ipairs(found) do redis.call('ZADD', KEYS[1], now + tonumber(ARGV[1]), job) end
return found
