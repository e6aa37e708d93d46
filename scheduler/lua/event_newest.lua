-- The newest entries of a stream, newest first.
-- KEYS[1]: stream.  ARGV: how many.
return redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', ARGV[1])
