-- Add a token for each node that is about to wait; the first `promised` nodes get free slots.
-- ARGV: ttl_ms, grace_ms, promised, node ...   Returns the number of open tokens.
for i = 4, #ARGV do
  local promised = i - 3 <= tonumber(ARGV[3])
  waiting = waiting + redis.call('ZADD', KEYS[1], promised and now or now + ARGV[2], ARGV[i])
  if promised then redis.call('ZADD', KEYS[3], now + ARGV[2], ARGV[i]) end
end
keep()
return waiting - won
