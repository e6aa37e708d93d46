-- A node has got its slot.  ARGV: ttl_ms, node.   Returns the tokens nobody has taken yet.
-- It uses up a slot that was coming, else a yield, whichever node that was made for: slots do not know who comes.
local counted = redis.call('ZREM', KEYS[1], ARGV[2])
if counted == 1 then
  waiting = waiting - 1
  use()
  keep()
end
return waiting - won
