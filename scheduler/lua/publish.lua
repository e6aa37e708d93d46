-- uses: clock
-- Publish the slots of a worker.
-- KEYS[1]: slots (HASH).  ARGV: worker, total, free, queues (JSON), ttl_ms.
-- A total of 0 removes the worker from the board.   Returns 1.
if ARGV[2] == '0' then return redis.call('HDEL', KEYS[1], ARGV[1]) end
local now = now_ms()
local total, free, queues = tonumber(ARGV[2]), tonumber(ARGV[3]), cjson.decode(ARGV[4])
local report = cjson.encode({total = total, free = free, queues = queues, at = now})
redis.call('HSET', KEYS[1], ARGV[1], report)
redis.call('PEXPIRE', KEYS[1], ARGV[5] * 10)
return 1
