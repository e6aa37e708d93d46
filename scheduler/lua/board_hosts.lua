-- uses: clock
-- Return the reports of live workers and of workers that are gone; delete old ones, and what is no
-- report.  The time of a worker that was stopped is negative (see board_withdraw).
-- KEYS[1]: hosts (HASH).  ARGV: stale_ms, ms for which a worker that is gone is remembered, most of them.
-- Returns {report, ...} and {{ms since its last report, 1: it was stopped, report}, ...}.
local now = now_ms()
local live, gone, all = {}, {}, redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local stopped, at, report = string.match(all[i + 1], '^(%-?)(%d+) (.*)$')
  local ago = at and now - tonumber(at)
  if ago and stopped == '' and ago <= tonumber(ARGV[1]) then
    live[#live + 1] = report
  elseif ago and ago <= tonumber(ARGV[2]) then
    gone[#gone + 1] = {math.max(0, ago), stopped == '-' and 1 or 0, report, all[i]}
  else
    redis.call('HDEL', KEYS[1], all[i])
  end
end
table.sort(gone, function(a, b) return a[1] < b[1] end)
while #gone > tonumber(ARGV[3]) do redis.call('HDEL', KEYS[1], table.remove(gone)[4]) end
return {live, gone}
