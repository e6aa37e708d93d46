-- uses: clock
-- Give a job a place, unless all places are taken.  A job that is no longer open loses its place.
-- KEYS: jobs with a place (ZSET job -> ms), index of open jobs (ZSET job -> ms of the next sweep).
-- ARGV: job ('': take nothing, just count), most, ms until its first sweep.
-- Returns {1 if the job has a place else 0, number of free places}.
local now = now_ms()
for _, job in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  if not redis.call('ZSCORE', KEYS[2], job) then redis.call('ZREM', KEYS[1], job) end
end
local left = tonumber(ARGV[2]) - redis.call('ZCARD', KEYS[1])
local has = redis.call('ZSCORE', KEYS[1], ARGV[1]) and 1 or 0
if has == 0 and left > 0 and ARGV[1] ~= '' then
  redis.call('ZADD', KEYS[1], now, ARGV[1])
  redis.call('ZADD', KEYS[2], 'NX', now + tonumber(ARGV[3]), ARGV[1])
  has, left = 1, left - 1
end
return {has, math.max(left, 0)}
