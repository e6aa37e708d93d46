-- Check whether the slot of a less urgent node belongs to a node that waits.
-- ARGV: ttl_ms, patience_ms.
-- Returns 1 while a promised slot is coming, or one that was given up less than patience_ms ago.
-- Else returns 0: the oldest coming slot is taken, perhaps by the caller, so others yield again.
local promised = redis.call('ZCOUNT', KEYS[3], '-inf', now + ARGV[2])
local given_up = redis.call('ZCOUNT', KEYS[3], '(' .. (now + ttl - ARGV[2]), '+inf')
if promised + given_up > 0 then return 1 end
if coming > 0 then
  redis.call('ZPOPMIN', KEYS[3])
  keep()
end
return 0
