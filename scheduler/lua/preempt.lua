-- uses: clock
-- Urgent nodes that wait in one queue, each a token for which another yields.
-- KEYS: waiting (ZSET node -> ms from which it may be yielded for), won (STRING: how many are about to yield), coming (ZSET
-- of slots that are free, or were just given up, and not followed by a claim yet -> ms until which they are believed).
-- ARGV[1]: ttl_ms.
local now = now_ms()
local ttl = tonumber(ARGV[1])
local void = redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ttl)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
local waiting, coming = redis.call('ZCARD', KEYS[1]), redis.call('ZCARD', KEYS[3])
local won = tonumber(redis.call('GET', KEYS[2]) or '0')

local function keep()
  if waiting == 0 then
    redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
  else
    redis.call('PEXPIRE', KEYS[1], ttl)
    redis.call('PEXPIRE', KEYS[3], ttl)
    redis.call('SET', KEYS[2], won, 'PX', ttl)
  end
end

-- A slot that is taken, or that nobody came for.  What was given up comes for certain, what was promised may be taken already.
local function use()
  if coming > 0 then
    redis.call('ZPOPMAX', KEYS[3])
    coming = coming - 1
  else
    won = math.max(0, won - 1)
  end
end

-- A token that is void takes its yield with it: else a node that came later would wait for that.
for _ = 1, void do use() end
won = math.min(waiting, won)
if void > 0 then keep() end
