-- Take a permit.
-- ARGV: permit, host, weight, lease ms, limit, limit by host (0: none), kind of limit (fixed, aimd,
-- elastic), largest limit, ms after which an elastic limit shrinks, waiter ('': none), its urgency
-- (0 is the most urgent).
-- Returns {1, used, limit, 0} or {0, used, limit, ms until the next lease ends}; used and limit are
-- text.  A permit that was taken before is not taken again.
if call('ZSCORE', permits, ARGV[1]) then return {1, tostring(used), ARGV[5], 0} end
local host, weight = ARGV[2], tonumber(ARGV[3])
local limit, per_host = tonumber(ARGV[5]), tonumber(ARGV[6])
local base, kind = limit, ARGV[7]
if kind ~= 'fixed' then limit = tonumber(call('HGET', about, 'limit') or ARGV[5]) end
if kind == 'elastic' then
  if used > base then call('HSET', about, 'above', now) end
  local above = tonumber(call('HGET', about, 'above') or '0')
  if used <= base and now - above > tonumber(ARGV[9]) then limit = base end
  if used + weight > limit then limit = math.min(tonumber(ARGV[8]), used + weight) end
end
local here = tonumber(call('HGET', hosts, host) or '0')
local room = used + weight <= limit and (per_host == 0 or here + weight <= per_host)
if not room then
  local first = call('ZRANGE', permits, 0, 0, 'WITHSCORES')
  if ARGV[10] ~= '' then
    call('ZADD', waiting, 'NX', tonumber(ARGV[11]) * 1e13 + now, ARGV[10])
    call('EXPIRE', waiting, KEEP_S)
  end
  return {0, tostring(used), tostring(limit), first[2] and tonumber(first[2]) - now or 0}
end
call('ZADD', permits, now + tonumber(ARGV[4]), ARGV[1])
call('HINCRBYFLOAT', about, 'used', weight)
call('HINCRBYFLOAT', hosts, host, weight)
if ARGV[10] ~= '' then call('ZREM', waiting, ARGV[10]) end
if kind == 'elastic' then
  call('HSET', about, 'limit', limit)
  if used + weight > base then call('HSET', about, 'above', now) end
end
for _, key in ipairs({permits, about, hosts}) do
  call('PEXPIRE', key, KEEP_S * 1000 + tonumber(ARGV[4]))
end
return {1, tostring(used + weight), tostring(limit), 0}
