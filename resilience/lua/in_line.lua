-- Say whether somebody stands in a line.  KEYS[1]: line.  ARGV: waiter.   Returns 1 or 0.
return redis.call('ZSCORE', KEYS[1], ARGV[1]) and 1 or 0
