-- uses: clock
-- Count the alerts that were raised.
-- KEYS: alerts of the last day (ZSET id -> ms), number of alerts of each severity (HASH).
-- Returns {number in the last hour, number in the last 24 hours, severity and total number ...}.
local now = now_ms()
local function since(ms)
  return redis.call('ZCOUNT', KEYS[1], '(' .. string.format('%.0f', now - ms), '+inf')
end
return {since(3600000), since(86400000), redis.call('HGETALL', KEYS[2])}
