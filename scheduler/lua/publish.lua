-- uses: clock
-- Say which slots a worker has.  KEYS[1]: slots hash.  ARGV: worker, total, free, queues (JSON), ttl_ms.
-- Total 0 takes the worker off the board.   Returns 1.
if ARGV[2] == '0' then return redis.call('HDEL', KEYS[1], ARGV[1]) end
local now = now_ms()
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode({total = tonumber(ARGV[2]), free = tonumber(ARGV[3]),
  queues = cjson.decode(ARGV[4]), at = now}))
redis.call('PEXPIRE', KEYS[1], ARGV[5] * 10)
return 1
