-- uses: clock
-- Raise alerts, unless one as bad of the same kind and subject was raised within the interval.
-- KEYS[1]: history stream.  KEYS[2]: when each alert of the last day was raised.  KEYS[3]: how many of each severity.
-- KEYS[4...]: of each alert, what is known of the last one of its kind and subject.
-- ARGV: how many are kept, then of each alert: its id, severity, the severity's rank, interval_ms, JSON.
-- Returns of each alert: whether it was raised, how many were held back since the last one, the time in s.
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
  local id, severity, rank, alert = ARGV[first], ARGV[first + 1], tonumber(ARGV[first + 2]), ARGV[first + 4]
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
