-- Return the newest entries of a stream, newest first.
-- KEYS[1]: stream.  ARGV: number of entries.
return redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', ARGV[1])
