-- Count nodes that are about to wait.  ARGV: ttl_ms, grace_ms, node ...   Returns the tokens nobody has taken yet.
for i = 3, #ARGV do waiting = waiting + redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[i]) end
keep()
return waiting - won
