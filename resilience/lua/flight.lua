-- uses: clock
-- The shared steps of a single flight.  KEYS: made, landed.
--
-- made:
-- - holder   id of the caller that makes the call
-- - till     ms at which its lease ends
-- - waiting  number of callers that wait for a value
-- - by       the owner for which the call is made
-- landed:
-- - id       id of the last landing
-- - value    the value that landed
--
-- A waiter knows the id of the last landing when it began; any other id is a new value for it.
local made, landed, call = KEYS[1], KEYS[2], redis.call
local KEEP_MS = 60000

-- Make the call when no caller does, or wait.
-- waited: 1 when the caller is counted in `waiting` already.
-- Returns 'mine', 'others', or 'again': taken over from an earlier holder with the same owner.
local function make_or_wait(id, lease_ms, by, waited)
  local now = now_ms()
  local m = call('HMGET', made, 'holder', 'till', 'waiting', 'by')
  local waiting = tonumber(m[3] or '0')
  local again = m[1] and by ~= '' and m[4] == by
  if m[1] and now < tonumber(m[2]) and not again then
    -- A waiter that missed a landing is not counted; while any waiter polls, at least one is.
    if waited == 0 or waiting == 0 then call('HINCRBY', made, 'waiting', 1) end
    return 'others'
  end
  call('HSET', made, 'holder', id, 'till', now + lease_ms, 'by', by,
       'waiting', math.max(0, waiting - waited))
  call('PEXPIRE', made, lease_ms + KEEP_MS)
  return again and 'again' or 'mine'
end
