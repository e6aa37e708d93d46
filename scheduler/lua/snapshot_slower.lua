-- Record that an operation became slower, or that it is no longer slower.
-- KEYS: operations that became slower (HASH operation -> s).
-- ARGV: operation, s since when it is slower ('': no longer), ttl_s.   Returns 1.
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
