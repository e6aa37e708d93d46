-- uses: clock
-- Count faults by pattern, keep the patterns that were seen last, and tell which have just exceeded their rate.
-- KEYS[1]: patterns hash.  KEYS[2]: when each was last seen.
-- ARGV: window_ms, rate, size, keep_ms, recovered, given up, then of each pattern: its name, category, severity, count.
-- Returns the names of the patterns that were calm before and are escalated now.
local call, patterns, seen = redis.call, KEYS[1], KEYS[2]
local now = now_ms()
local window = math.floor(now / tonumber(ARGV[1]))
local rate, size, keep, crossed = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), {}

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
  local found = call('HGET', patterns, ARGV[i])
  local p = found and cjson.decode(found) or {count = 0, first = now, window = window, here = 0, before = 0}
  if p.window ~= window then
    p.before = p.window == window - 1 and p.here or 0
    p.window, p.here = window, 0
  end
  local calm = p.here <= rate and p.before <= rate
  p.category, p.severity, p.last = ARGV[i + 1], tonumber(ARGV[i + 2]), now
  p.count, p.here = p.count + tonumber(ARGV[i + 3]), p.here + tonumber(ARGV[i + 3])
  if calm and p.here > rate then crossed[#crossed + 1] = ARGV[i] end
  call('HSET', patterns, ARGV[i], cjson.encode(p))
  call('ZADD', seen, now, ARGV[i])
end
forget(call('ZRANGE', seen, 0, -1 - size))
call('PEXPIRE', patterns, keep)
call('PEXPIRE', seen, keep)
return crossed
