-- uses: clock
-- Count faults by pattern, and keep the patterns that were seen last.
-- KEYS: patterns (HASH), time of the last fault of each (ZSET).
-- ARGV: window_ms, rate, size, keep_ms, recovered, given up, then for each pattern its name,
-- category, severity and count.
-- Returns the names of the patterns that exceed their rate now and did not before.
local call, patterns, seen = redis.call, KEYS[1], KEYS[2]
local now = now_ms()
local window = math.floor(now / tonumber(ARGV[1]))
local rate, size, keep, escalated = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), {}

local function forget(names)
  for _, name in ipairs(names) do
    call('HDEL', patterns, name)
    call('ZREM', seen, name)
  end
end

call('HINCRBY', patterns, 'recovered', ARGV[5])
call('HINCRBY', patterns, 'given_up', ARGV[6])
forget(call('ZRANGEBYSCORE', seen, '-inf', now - keep))
for i = 7, #ARGV, 4 do
  local record = call('HGET', patterns, ARGV[i])
  -- A record of another release, or a damaged one, begins anew.
  local read, p = pcall(cjson.decode, record or '')
  p = read and type(p) == 'table' and p.here and p
    or {count = 0, first = now, window = window, here = 0, before = 0}
  if p.window ~= window then
    p.before = p.window == window - 1 and p.here or 0
    p.window, p.here = window, 0
  end
  local calm = p.here <= rate and p.before <= rate
  p.category, p.severity, p.last = ARGV[i + 1], tonumber(ARGV[i + 2]), now
  p.count, p.here = p.count + tonumber(ARGV[i + 3]), p.here + tonumber(ARGV[i + 3])
  if calm and p.here > rate then escalated[#escalated + 1] = ARGV[i] end
  call('HSET', patterns, ARGV[i], cjson.encode(p))
  call('ZADD', seen, now, ARGV[i])
end
forget(call('ZRANGE', seen, 0, -1 - size))
call('PEXPIRE', patterns, keep)
call('PEXPIRE', seen, keep)
return escalated
