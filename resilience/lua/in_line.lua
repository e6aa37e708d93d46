-- Returns 1 if a waiter stands in a line, else 0.  KEYS[1]: line.  ARGV: waiter.
return redis.call('ZSCORE', KEYS[1], ARGV[1]) and 1 or 0
