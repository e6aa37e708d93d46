-- The server's clock: one time for all workers.  `Script.load` puts this file in front of each
-- script whose first line is `-- uses: clock`.

-- Microseconds since 1970.
local function now_us()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

-- Milliseconds since 1970.
local function now_ms() return math.floor(now_us() / 1000) end

-- Microseconds as seconds, in text with six decimals.
local function in_seconds(us)
  return string.format('%.0f.%06d', math.floor(us / 1000000), us % 1000000)
end
