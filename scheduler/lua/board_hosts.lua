-- uses: clock
-- Return the reports that are not older than stale_ms, and delete the others, and what is no report.
-- KEYS[1]: hosts (HASH).  ARGV: stale_ms.
local now = now_ms()
local found, all = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local at, report = string.match(all[i + 1], '^(%d+) (.*)$')
  if not at or now - tonumber(at) > tonumber(ARGV[1]) then
    redis.call('HDEL', KEYS[1], all[i])
  else
    found[#found + 1] = report
  end
end
return found
