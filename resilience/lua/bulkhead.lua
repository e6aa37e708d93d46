-- uses: clock
-- The shared steps of a bulkhead.  KEYS: permits, about, hosts, waiting.
--
-- A permit is "owner|host|weight|id", scored by the ms at which its lease ends.
-- about:
-- - used   sum of the weights in flight
-- - limit  the current limit, if it is not fixed
-- - cut    ms of its last decrease
-- - above  ms at which use was above the base last
local permits, about, hosts, waiting, call = KEYS[1], KEYS[2], KEYS[3], KEYS[4], redis.call
local KEEP_S = 86400

local now = now_ms()

local function give_back(permit)
  local host, weight = string.match(permit, '^[^|]*|([^|]*)|([^|]*)|')
  call('HINCRBYFLOAT', about, 'used', -tonumber(weight))
  local left = tonumber(call('HINCRBYFLOAT', hosts, host, -tonumber(weight)))
  if left <= 0 then call('HDEL', hosts, host) end
  return tonumber(weight)
end

for _, permit in ipairs(call('ZRANGEBYSCORE', permits, '-inf', now)) do
  call('ZREM', permits, permit)
  give_back(permit)
end
local used = tonumber(call('HGET', about, 'used') or '0')
if used ~= 0 and call('ZCARD', permits) == 0 then  -- no permit is out: the sum was damaged
  call('HDEL', about, 'used')
  call('DEL', hosts)
  used = 0
end

local function woken(most)
  local waiters = {}
  local popped = call('ZPOPMIN', waiting, most)
  for i = 1, #popped, 2 do waiters[#waiters + 1] = popped[i] end
  return unpack(waiters)
end
