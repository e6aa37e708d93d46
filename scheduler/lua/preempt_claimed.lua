-- A node has got its slot.  ARGV: ttl_ms, node.   Returns the tokens nobody has taken yet.
-- A claim uses up a yield that was made, whichever node it was made for: slots do not know who comes.
local counted = redis.call('ZREM', KEYS[1], ARGV[2])
if counted == 1 then
  waiting, won = waiting - 1, math.max(0, won - 1)
  keep()
end
return waiting - won
