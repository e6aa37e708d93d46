-- A node that had won a token has given up its slot.
-- ARGV: ttl_ms, name of that node.   Returns the number of open tokens.
if won > 0 then
  won = won - 1
  redis.call('ZADD', KEYS[3], now + ttl, ARGV[2])
  keep()
end
return waiting - won
