-- uses: clock
-- Record that an endpoint has answered a call.  KEYS[1]: HASH endpoint -> ms.  ARGV: endpoint, ms to
-- keep it.
redis.call('HSET', KEYS[1], ARGV[1], now_ms())
redis.call('PEXPIRE', KEYS[1], ARGV[2])
