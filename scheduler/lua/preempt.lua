-- Urgent nodes that wait in one queue, each a token for which another yields.
-- KEYS: waiting (ZSET node -> ms from which it may be yielded for), won (STRING: how many have yielded and not been followed
-- by a claim).   ARGV[1]: ttl_ms.
local t = redis.call('TIME')
local now = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
local ttl = tonumber(ARGV[1])
local void = redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ttl)
local waiting = redis.call('ZCARD', KEYS[1])
-- A token that is void takes its yield with it, as a claim does: else a node that came later would wait for that.
local won = math.min(waiting, math.max(0, tonumber(redis.call('GET', KEYS[2]) or '0') - void))

local function keep()
  if waiting == 0 then
    redis.call('DEL', KEYS[1], KEYS[2])
  else
    redis.call('PEXPIRE', KEYS[1], ttl)
    redis.call('SET', KEYS[2], won, 'PX', ttl)
  end
end

if void > 0 then keep() end
