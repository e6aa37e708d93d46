-- uses: clock
-- Note when to look at a swept job again.  KEYS[1]: index of due jobs.  ARGV: job, ms (0: never).
-- A time that is still to come was noted while the sweep ran, and stays.   Returns 1 when it was noted.
local now = now_ms()
if ARGV[2] == '0' then return redis.call('ZREM', KEYS[1], ARGV[1]) end
local noted = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or '0')
if noted > now and noted < tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
return 1
