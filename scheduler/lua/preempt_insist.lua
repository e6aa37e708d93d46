-- End the grace of nodes that still wait.  ARGV: ttl_ms, node ...   Returns the tokens nobody has taken yet.
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now, ARGV[i]) end
return waiting - won
