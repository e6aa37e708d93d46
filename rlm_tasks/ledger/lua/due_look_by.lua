-- uses: clock
-- Make sure that a sweep of a job comes in time; an earlier time stays.
-- KEYS[1]: index of due jobs.  ARGV: job, ms from now.   Returns 1.
local now = now_ms()
redis.call('ZADD', KEYS[1], 'LT', now + tonumber(ARGV[2]), ARGV[1])
return 1
