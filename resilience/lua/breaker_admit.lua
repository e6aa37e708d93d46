-- Admit a call.  ARGV: ..., permit, waiter ('': none), its urgency (0 is the most urgent).
-- Verdicts: go, probe, no.  Waiters get different times, so that not all return for a few probes.
local permit, waiter = ARGV[3], ARGV[4]
local b = read()
if b.st == OPEN and now >= b.till then move(b, HALF_OPEN) end
if b.st == HALF_OPEN then call('ZREMRANGEBYSCORE', probes, '-inf', now) end
local room = b.st == HALF_OPEN and call('ZCARD', probes) < c.probes
if b.st == CLOSED or room then
  if waiter ~= '' then call('ZREM', waiting, waiter) end
  if not room then return answer('go', b, 0, 0) end
  call('ZADD', probes, now + c.lease_ms, permit)
  call('PEXPIRE', probes, 2 * c.lease_ms)
  return answer('probe', b, 0, 0)
end
local wait = b.till - now
if b.st == HALF_OPEN then wait = tonumber(call('ZRANGE', probes, 0, 0, 'WITHSCORES')[2]) - now end
if waiter ~= '' then
  call('ZADD', waiting, 'NX', tonumber(ARGV[5]) * 1e13 + now, waiter)
  call('EXPIRE', waiting, KEEP_S)
  wait = wait + math.min(math.floor(call('ZRANK', waiting, waiter) / c.probes) * 1000, c.lease_ms)
end
return answer('no', b, wait, 0)
