-- Who has won a token has given up its slot.  ARGV: ttl_ms, who.   Returns the tokens nobody has taken yet.
if won > 0 then
  won = won - 1
  redis.call('ZADD', KEYS[3], now + ttl, ARGV[2])
  keep()
end
return waiting - won
