-- Return the names of all breakers changed lately, the newest first.  KEYS[1]: index.
return redis.call('ZRANGE', KEYS[1], 0, -1, 'REV')
