-- A node has its slot: remove its token.  ARGV: ttl_ms, node.   Returns the number of open tokens.
-- The node uses a coming slot, else a yield; slots are not bound to nodes, so it may be any.
local counted = redis.call('ZREM', KEYS[1], ARGV[2])
if counted == 1 then
  waiting = waiting - 1
  use()
  keep()
end
return waiting - won
