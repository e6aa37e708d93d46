-- Somebody less urgent has got a slot.  ARGV: ttl_ms, patience_ms.
-- Returns 1 while a slot is on its way that was promised, or given up less than patience_ms ago: it is for a node that waits.
-- One that was given up before that is taken by now, perhaps by the caller: others yield again.
local promised = redis.call('ZCOUNT', KEYS[3], '-inf', now + ARGV[2])
local given_up = redis.call('ZCOUNT', KEYS[3], '(' .. (now + ttl - ARGV[2]), '+inf')
if promised + given_up > 0 then return 1 end
if coming > 0 then
  redis.call('ZPOPMIN', KEYS[3])
  keep()
end
return 0
