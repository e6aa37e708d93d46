-- End the grace of nodes that still wait.
-- ARGV: ttl_ms, node ...   Returns the number of open tokens.
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now, ARGV[i]) end
return waiting - won
