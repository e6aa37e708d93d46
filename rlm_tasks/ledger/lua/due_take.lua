-- uses: clock
-- Take jobs that are due for a sweep, so that one worker sweeps each.  KEYS[1]: index of due jobs.
-- ARGV: ms after which another worker may take them, largest number of jobs.   Returns their ids.
local now = now_ms()
-- An older release lets the index expire with the jobs of one client.
redis.call('PERSIST', KEYS[1])
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[2])
for _, job in ipairs(found) do redis.call('ZADD', KEYS[1], now + tonumber(ARGV[1]), job) end
return found
