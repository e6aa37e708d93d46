-- uses: clock
-- Prelude of the preempt_* scripts: the tokens of one queue, one for each urgent node that waits.
-- KEYS[1] waiting: ZSET node -> ms at which its grace ends; then another node may yield for it.
-- KEYS[2] won: STRING, the number of tokens that were won and are not followed by a yield yet.
-- KEYS[3] coming: ZSET slot -> ms until which it counts.  A slot is coming if it was promised or
--   given up, and no node has claimed it yet.
-- ARGV[1]: ttl_ms.
-- A script may use: now, waiting, won and coming (numbers), ttl, keep() and use().
local now = now_ms()
local ttl = tonumber(ARGV[1])
local void = redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ttl)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
local waiting, coming = redis.call('ZCARD', KEYS[1]), redis.call('ZCARD', KEYS[3])
local won = tonumber(redis.call('GET', KEYS[2]) or '0')

-- Store the numbers, and renew the expiry of the keys.
local function keep()
  if waiting == 0 then
    redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
  else
    redis.call('PEXPIRE', KEYS[1], ttl)
    redis.call('PEXPIRE', KEYS[3], ttl)
    redis.call('SET', KEYS[2], won, 'PX', ttl)
  end
end

-- Count one slot as used: a coming slot, else a yield that was won.  Given-up slots expire last, so
-- they are used first: they are certain, and a promised slot may be taken already.
local function use()
  if coming > 0 then
    redis.call('ZPOPMAX', KEYS[3])
    coming = coming - 1
  else
    won = math.max(0, won - 1)
  end
end

-- A token that expired takes its yield along: else a later node would wait for that yield.
for _ = 1, void do use() end
won = math.min(waiting, won)
if void > 0 then keep() end
