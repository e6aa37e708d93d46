-- Add a snapshot of an operation: its counts since the last snapshot.  Without a run none is added.
-- KEYS: the operation's counts (HASH), its snapshots (LIST, newest first), operations that became
--   slower (HASH operation -> s).
-- ARGV: operation, s of the server's clock, number of snapshots to keep, ttl_s.
-- Returns {snapshots, s since when it is slower or ''}.
local counts = redis.call('HMGET', KEYS[1], 'done', 'failed', 'busy_us', 'lately_kb', 'version',
  'snap_done', 'snap_failed', 'snap_busy_us')
for i = 1, 8 do counts[i] = tonumber(counts[i] or '0') or 0 end
local done, failed, busy_us = counts[1] - counts[6], counts[2] - counts[7], counts[3] - counts[8]
if done + failed > 0 then
  local snapshot = string.format('[%s,%d,%d,%.0f,%d,%d]',
    ARGV[2], done + failed, failed, busy_us, counts[4], counts[5])
  redis.call('LPUSH', KEYS[2], snapshot)
  redis.call('LTRIM', KEYS[2], 0, ARGV[3] - 1)
  redis.call('HSET', KEYS[1], 'snap_done', counts[1], 'snap_failed', counts[2],
    'snap_busy_us', counts[3], 'lately_kb', 0)
  redis.call('EXPIRE', KEYS[2], ARGV[4])
end
return {redis.call('LRANGE', KEYS[2], 0, -1), redis.call('HGET', KEYS[3], ARGV[1]) or ''}
