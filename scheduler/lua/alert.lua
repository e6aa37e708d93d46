-- uses: clock
-- Raise alerts.  An alert is held back if one as severe of the same kind and subject was raised
-- within its interval.
-- KEYS[1]: history (STREAM).  KEYS[2]: alerts of the last day (ZSET id -> ms).
-- KEYS[3]: number of alerts of each severity (HASH).
-- KEYS[4...]: for each alert, the last alert of its kind and subject (HASH ms, rank, held).
-- ARGV: number of alerts to keep, then for each alert: id, severity, rank of the severity,
--   interval_ms, JSON.
-- Returns for each alert: 1 if it was raised else 0, number held back before it, time in s.
local call, DAY_MS, answers = redis.call, 86400000, {}
local us = now_us()
local now, at = math.floor(us / 1000), in_seconds(us)

local function held(gate, rank, interval)
  local last = call('HMGET', gate, 'ms', 'rank')
  local since = last[1] and now - tonumber(last[1])
  return since and since >= 0 and since < interval and rank <= tonumber(last[2])
end

call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - DAY_MS)
for i = 4, #KEYS do
  local first, gate = (i - 4) * 5 + 2, KEYS[i]
  local id, severity, alert = ARGV[first], ARGV[first + 1], ARGV[first + 4]
  local rank = tonumber(ARGV[first + 2])
  local raised = not held(gate, rank, tonumber(ARGV[first + 3]))
  local before = tonumber(call('HGET', gate, 'held') or 0)
  if raised then
    call('HSET', gate, 'ms', now, 'rank', rank, 'held', 0)
    call('PEXPIRE', gate, DAY_MS)
    call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', 'alert', alert, 'held', before, 'at', at)
    call('ZADD', KEYS[2], now, id)
    call('PEXPIRE', KEYS[2], DAY_MS)
    call('HINCRBY', KEYS[3], severity, 1)
  else
    call('HINCRBY', gate, 'held', 1)
  end
  answers[#answers + 1] = {raised and 1 or 0, before, at}
end
return answers
