-- Return the members of an index that were noted in the last day, the newest first.  KEYS[1]: index.
return redis.call('ZRANGE', KEYS[1], 0, -1, 'REV')
