-- Report the end of a call.  ARGV: ..., permit, generation of its admission, ok | failed | ignored.
-- Verdicts: kept, opened, closed, dropped (admitted in another generation, or a probe whose lease
-- has ended).
local b, outcome = read(), ARGV[5]
if outcome == 'failed' then b.at = now end
call('ZREMRANGEBYSCORE', probes, '-inf', now)
local held = call('ZREM', probes, ARGV[3]) == 1
if b.st == OPEN or string.format('%.0f', b.gen) ~= ARGV[4] then
  return answer('dropped', b, 0, held and b.st == HALF_OPEN and 1 or 0)
end
if b.st == HALF_OPEN then
  if not held then return answer('dropped', b, 0, 0) end
  if outcome == 'failed' then
    b.f = b.f + 1
    move(b, OPEN)
    return answer('opened', b, 0, 0)
  end
  b.hs = b.hs + (outcome == 'ok' and 1 or 0)
  if b.hs >= c.successes then
    move(b, CLOSED)
    return answer('closed', b, 0, 1000)
  end
  write(b)
  return answer('kept', b, 0, 1)
end
if outcome == 'ignored' then return answer('kept', b, 0, 0) end
local failed = outcome == 'failed'
b.f = failed and b.f + 1 or 0
local tripped = b.f >= c.failures
if c.rate > 0 then
  local oks, fails = count(b, failed and 0 or 1, failed and 1 or 0)
  tripped = tripped or (failed and oks + fails >= c.calls and fails / (oks + fails) >= c.rate)
end
if tripped then
  move(b, OPEN)
  return answer('opened', b, 0, 0)
end
write(b)
return answer('kept', b, 0, 0)
