-- Give permits back: one, or all of an owner.
-- ARGV: permit ('': all of the owner), owner, ok | failed | dropped, lease ms, kind of limit, limit,
-- largest limit, slow ms (0: the limit does not follow the time of calls).
-- Returns {number of permits that were held, limit as text, waiters to wake ...}.
--
-- An adaptive limit grows by 1 for each round of calls while half of it is used.  It falls by a
-- tenth for a round with drops (additive increase, multiplicative decrease: Chiu and Jain, 1989).
local chosen = {ARGV[1]}
if ARGV[1] == '' then
  chosen = {}
  for _, permit in ipairs(call('ZRANGE', permits, 0, -1)) do
    if string.sub(permit, 1, #ARGV[2] + 1) == ARGV[2] .. '|' then chosen[#chosen + 1] = permit end
  end
end
if ARGV[5] == 'elastic' and used > tonumber(ARGV[6]) then call('HSET', about, 'above', now) end
local held, limit = 0, tonumber(call('HGET', about, 'limit') or ARGV[6])
local before, outcome, most, slow = limit, ARGV[3], tonumber(ARGV[7]), tonumber(ARGV[8] or '0')

local function field(name) return tonumber(call('HGET', about, name) or '0') end

-- The limit after a drop or a success; `began` is the ms at which the call began.
local function followed(weight, began)
  if outcome == 'dropped' then
    if began <= field('cut') then return limit end
    call('HSET', about, 'cut', now)
    return math.max(1, limit * 0.9)
  end
  return 2 * used >= limit and math.min(most, limit + weight / limit) or limit
end

-- Whether calls take long because they are longer, and wait in no queue: two rounds after the limit
-- was halved took about as long as the one before.
local function are_longer(mean)
  local queue, rounds = field('queue'), call('HINCRBY', about, 'rounds', 1)
  if queue > 0 and mean > 0.75 * queue then return rounds >= 2 end
  call('HDEL', about, 'queue')
  return false
end

-- The limit after a round of calls, a share of which was dropped.  The others took `mean` ms.
-- Fields:
-- best   least mean of all rounds: the time of a call when no other waits
-- roof   the limit before it was halved last; growth is slow from half of it on (slow start:
--        Jacobson, 1988)
-- queue  mean before the limit was halved because calls waited in a queue of the service
-- rounds number of rounds since then
local function after_round(mean, dropped)
  local best, roof = field('best'), field('roof')
  local overloaded = dropped > 0.25 or dropped > 0.1 and mean > slow
  if are_longer(mean) then best = mean end
  if best == 0 or mean > 0 and mean < best then best = mean end
  if limit >= roof then roof = 0 end
  local queued = mean > 1.8 * best
  local waits = queued and mean > slow and field('queue') == 0
  if overloaded or waits then
    roof = limit
    call('HSET', about, 'cut', now, 'queue', waits and mean or 0, 'rounds', 0)
  end
  call('HSET', about, 'best', best, 'roof', roof)
  if overloaded or waits then return math.max(1, limit / 2) end
  if 2 * used < limit or queued and mean > slow then return limit end
  if queued or 2 * limit >= roof and roof > 0 then
    return math.min(most, limit + math.max(1, limit / 4))
  end
  return math.min(most, limit * math.max(2, math.min(8, slow / math.max(mean, 1))))
end

-- The limit after a call of a round.  A round is as many calls as the limit; those that began before
-- the limit was halved do not count.
local function timed(began)
  if outcome == 'failed' or began <= field('cut') then return limit end
  local drops = call('HINCRBY', about, 'drops', outcome == 'dropped' and 1 or 0)
  local calls = call('HINCRBY', about, 'calls', outcome == 'ok' and 1 or 0)
  local took = call('HINCRBY', about, 'took', outcome == 'ok' and now - began or 0)
  if drops + calls < limit then return limit end
  call('HDEL', about, 'drops', 'calls', 'took')
  return after_round(calls > 0 and took / calls or 0, drops / (drops + calls))
end

for _, permit in ipairs(chosen) do
  local till = tonumber(call('ZSCORE', permits, permit) or '0')
  if call('ZREM', permits, permit) == 1 then
    held = held + 1
    local weight, began = give_back(permit), till - tonumber(ARGV[4])
    if ARGV[5] == 'aimd' and ARGV[1] ~= '' then
      limit = slow > 0 and timed(began) or slow == 0 and followed(weight, began) or limit
      call('HSET', about, 'limit', string.format('%.6f', limit))
    end
  end
end
local free = math.floor(limit - tonumber(call('HGET', about, 'used') or '0'))
if held == 0 or ARGV[5] == 'aimd' and free < 1 then return {held, tostring(limit)} end
return {held, tostring(limit), woken(math.max(held, limit > before and free or 0))}
