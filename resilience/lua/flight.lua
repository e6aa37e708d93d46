-- uses: clock
-- The shared steps of a single flight.  KEYS: made, landed.
--
-- made:    holder  who makes the call    till   ms at which its lease ends    waiting  how many wait for a value
--          by  on whose behalf
-- landed:  id      who landed last       value
-- Who waits has seen which landing was the last when it began: any other is news to it, whoever landed it.
local made, landed, call = KEYS[1], KEYS[2], redis.call
local KEEP_MS = 60000

-- Make the call when nobody does, or wait.  waited: 1 when who asks is counted among those who wait.  Returns 'mine', 'others',
-- or 'again': who made it did so on the same behalf, and is gone.
local function make_or_wait(id, lease_ms, by, waited)
  local now = now_ms()
  local m = call('HMGET', made, 'holder', 'till', 'waiting', 'by')
  local waiting = tonumber(m[3] or '0')
  local again = m[1] and by ~= '' and m[4] == by
  if m[1] and now < tonumber(m[2]) and not again then
    -- Who slept through a landing is counted no more: at least one is, as long as somebody looks.
    if waited == 0 or waiting == 0 then call('HINCRBY', made, 'waiting', 1) end
    return 'others'
  end
  call('HSET', made, 'holder', id, 'till', now + lease_ms, 'by', by, 'waiting', math.max(0, waiting - waited))
  call('PEXPIRE', made, lease_ms + KEEP_MS)
  return again and 'again' or 'mine'
end
