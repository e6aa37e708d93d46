-- Record that an endpoint has answered a call.  KEYS[1]: HASH endpoint -> ms.  ARGV: endpoint, ms to
-- keep it.
local t = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], t[1] * 1000 + math.floor(t[2] / 1000))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
