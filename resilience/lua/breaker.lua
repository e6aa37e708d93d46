-- uses: clock
-- The shared steps of a breaker.  KEYS: state, probes, waiting, index of breakers.
-- ARGV: name, config (JSON: failures, recovery_ms, probes, lease_ms, successes, window_ms, rate,
-- calls), ...
--
-- State hash:
-- - st    state
-- - gen   generation: a number that grows with every change of state
-- - till  ms until which it is open
-- - f     failures in a row
-- - hs    successes of probes since it became half-open
-- - at    ms of the last failure
-- - w     window as JSON: {number of a slot, successes, failures} ...
-- Every script returns {verdict, st, gen, ms for which it stays open, f, hs, at, ms to wait,
-- waiters to wake ...}.
local state, probes, waiting, names = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local name, c, call = ARGV[1], cjson.decode(ARGV[2]), redis.call
local CLOSED, OPEN, HALF_OPEN = 'closed', 'open', 'half-open'
local KEEP_S, SLOTS = 86400, 10

local us = now_us()
local now = math.floor(us / 1000)

local function read()
  local v = call('HMGET', state, 'st', 'gen', 'till', 'f', 'hs', 'at', 'w')
  return {
    st = v[1] or CLOSED,
    gen = tonumber(v[2] or '0'),
    till = tonumber(v[3] or '0'),
    f = tonumber(v[4] or '0'),
    hs = tonumber(v[5] or '0'),
    at = tonumber(v[6] or '0'),
    w = v[7] and cjson.decode(v[7]) or {},
  }
end

local function write(b)
  call('HSET', state, 'st', b.st, 'gen', string.format('%.0f', b.gen), 'till', b.till, 'f', b.f,
       'hs', b.hs, 'at', b.at, 'w', cjson.encode(b.w))
  call('PEXPIRE', state, KEEP_S * 1000 + c.recovery_ms)
  call('ZADD', names, now, name)
  call('ZREMRANGEBYSCORE', names, '-inf', now - KEEP_S * 1000 - c.recovery_ms)
  call('EXPIRE', names, 30 * KEEP_S)
end

-- A new state is a new generation, and calls admitted in another one do not count in it.  Probes
-- keep their places until they end or their leases do, because they are still in flight.
local function move(b, st)
  b.gen = math.max(b.gen + 1, us)
  b.st, b.hs, b.w = st, 0, {}
  b.till = st == OPEN and now + c.recovery_ms or 0
  if st == CLOSED then b.f = 0 end
  write(b)
end

local function answer(verdict, b, wait, most)
  local woken = {}
  if most > 0 then
    local popped = call('ZPOPMIN', waiting, most)
    for i = 1, #popped, 2 do woken[#woken + 1] = popped[i] end
  end
  local open_ms = b.st == OPEN and math.max(0, b.till - now) or 0
  local gen = string.format('%.0f', b.gen)
  return {verdict, b.st, gen, open_ms, b.f, b.hs, b.at, wait, unpack(woken)}
end

-- Add calls to the window, and drop its old slots.  Returns the successes and failures in it.
local function count(b, good, bad)
  local width = c.window_ms / SLOTS
  local slot, kept, oks, fails = math.floor(now / width), {}, 0, 0
  b.w[#b.w + 1] = {slot, good, bad}
  for _, each in ipairs(b.w) do
    if each[1] > slot - SLOTS then
      local last = kept[#kept]
      if last and last[1] == each[1] then
        last[2], last[3] = last[2] + each[2], last[3] + each[3]
      else
        kept[#kept + 1] = each
      end
      oks, fails = oks + each[2], fails + each[3]
    end
  end
  b.w = kept
  return oks, fails
end
