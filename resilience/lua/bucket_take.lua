-- Take from all limits at once, or from none.
-- ARGV: taker, ms to keep the grant, longest wait, the line of a waiter ('': none), how many times
-- the waiter would take the amounts, most to lease.  Then JSON for each limit: limit, window,
-- capacity, guard, amount, amount that this priority must leave, amounts taken in the last window
-- while Redis was away ([age, amount] ...), microseconds of a hold that was set meanwhile.
-- Returns {1, wait, at, leased, takers} or {0, wait, number of the limit that denies, end of the
-- provider's pause, takers}; the end is 0 if something else denies it longer.

-- A waiter takes up to the refill of TURN at once, so that few waiters are woken for little.  It
-- takes at most SHARE of a full bucket, so that the bucket does not overflow when it comes late.
-- A waiter that returns too early by less than EARLY of its turn keeps its turn.
-- When a bucket has been full for LATE, its LINES begin anew.
local TURN, SHARE, EARLY, LATE = 100000, 1 / 3, 1 / 4, 500000
local LINES = {'new0', 'new1', 'new2', 'new3', 'back0', 'back1', 'back2', 'back3'}

-- Returns the microseconds until an amount may be taken.  An amount above the capacity is granted
-- when the bucket is full, and leaves a debt.
local function needs(b, amount)
  local short = math.min(amount, b.capacity - b.left) + b.left - b.v
  local ready = math.max(b.hold, leaves(b, math.max(0, b.limit - b.left - amount)))
  return math.max(ready - now, short > 1e-9 and short / b.rate or 0)
end

local limits, wait, binding = {}, 0, 0
if math.abs(now - tonumber(call('ZSCORE', KEYS[2], ARGV[1]) or 0)) > 1000000 then
  call('ZADD', KEYS[2], now, ARGV[1])
  call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 60000000)
  call('EXPIRE', KEYS[2], 3600)
end
local takers = call('ZCARD', KEYS[2])
local taken = call('HGET', KEYS[1], 'at')
if taken then return {1, math.max(0, tonumber(taken) - now), tonumber(taken), 0, takers} end

for i = 4, #KEYS do
  local a = cjson.decode(ARGV[3 + i])
  local b = read(KEYS[i], a[1], a[2], a[3], a[4])
  if b.full > LATE then call('HDEL', b.key, unpack(LINES)) end
  b.amount, b.left = a[5], a[6]
  -- Amounts taken without Redis were paced already.  They count in the window at their own times,
  -- and at most empty the bucket.
  local before, given = b.v, 0
  for _, each in ipairs(a[7]) do
    put(b, each[2], now - each[1])
    given = given + each[2]
  end
  if given > 0 then
    b.v = math.max(math.min(before, 0), before - given)
    call('HSET', b.key, 'v', exact(b.v))
  end
  if a[8] > 0 then
    b.hold = math.max(b.hold, now + a[8])
    call('HSET', b.key, 'hold', exact(b.hold))
    if call('PTTL', b.key) * 1000 < a[8] then
      call('PEXPIRE', b.key, math.ceil(a[8] / 1000) + 60000)
    end
  end
  local mine = needs(b, b.amount)
  if mine > wait then wait, binding = mine, i - 3 end
  limits[#limits + 1] = b
end
-- One microsecond more than computed, so that rounding does not deny it again.
local asked = wait
if wait > 0 then wait = math.ceil(wait) + 1 end

if wait > tonumber(ARGV[3]) then
  if ARGV[4] ~= '' then
    -- Waiters are served one after the other, so each gets its own time: the time at which all that
    -- it takes is there.  An amount beyond a full bucket delays the next waiter instead.
    local line, times, all, full, paid = limits[binding], tonumber(ARGV[5]), wait, 0, 0
    for _, b in ipairs(limits) do
      if b.amount > 0 then
        local turn = math.min(TURN * b.rate, SHARE * b.capacity)
        times = math.min(times, math.max(1, floor(turn / b.amount)))
      end
    end
    for _, b in ipairs(limits) do
      local uses = times * b.amount * b.ratio
      all = math.max(all, needs(b, times * b.amount))
      full = math.max(full, math.min(uses, b.capacity) / b.rate)
      paid = math.max(paid, uses / b.rate)
    end
    if ARGV[4]:find('new', 1, true) or wait > EARLY * paid then
      local mine = math.max(now + all, tonumber(call('HGET', line.key, ARGV[4]) or '0') + full)
      call('HSET', line.key, ARGV[4], exact(mine + paid - full))
      local left_ms = math.ceil((mine + paid - now) / 1000) + 60000
      if call('PTTL', line.key) < left_ms then call('PEXPIRE', line.key, left_ms) end
      wait = math.ceil(mine - now)
    end
  end
  local hold = limits[binding].hold
  return {0, wait, binding, hold > now and hold - now >= asked and hold or 0, takers}
end

local at, leased = now + wait, 0
local first = limits[1]
if wait == 0 and tonumber(ARGV[6]) > 0 then
  local room = math.min(first.v, first.limit - first.sum) - first.left - first.amount
  leased = math.max(0, math.min(tonumber(ARGV[6]), math.floor(room)))
  first.amount = first.amount + leased
end
local about = {'at', at}
for i, b in ipairs(limits) do
  local cell = put(b, b.amount, at)
  for _, each in ipairs({'a' .. i, b.amount, 'c' .. i, cell}) do about[#about + 1] = each end
end
call('HSET', KEYS[1], unpack(about))
call('PEXPIRE', KEYS[1], tonumber(ARGV[2]) + math.ceil(wait / 1000))
return {1, wait, at, leased, takers}
