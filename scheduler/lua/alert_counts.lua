-- uses: clock
-- How many alerts were raised.
-- KEYS[1]: when each alert of the last day was raised.  KEYS[2]: how many of each severity.
-- Returns those of the last hour, of the last 24 hours, and since ever by severity.
local now = now_ms()
local function since(ms)
  return redis.call('ZCOUNT', KEYS[1], '(' .. string.format('%.0f', now - ms), '+inf')
end
return {since(3600000), since(86400000), redis.call('HGETALL', KEYS[2])}
