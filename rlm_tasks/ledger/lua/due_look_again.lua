-- uses: clock
-- Record the time of a swept job's next sweep.
-- KEYS: index of due jobs, record of the job.  ARGV: job, time in ms (0: never).
-- A job may have been opened since its sweep found none; then it stays.
-- An earlier time in the future stays: it was recorded while the sweep ran.
-- Returns 1 when the time was recorded, or removed with 0.
local now = now_ms()
if ARGV[2] == '0' then
  local state = redis.call('HGET', KEYS[2], 'state')
  if state == 'pending' or state == 'running' or state == 'merging' then return 0 end
  return redis.call('ZREM', KEYS[1], ARGV[1])
end
local noted = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or '0')
if noted > now and noted < tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
return 1
