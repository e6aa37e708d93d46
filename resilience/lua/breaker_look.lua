-- Read a breaker, and add successes that its reader has counted since the last time.
-- ARGV: ..., successes, their generation.
local b, good = read(), tonumber(ARGV[3])
if good > 0 and b.st == CLOSED and string.format('%.0f', b.gen) == ARGV[4] then
  count(b, good, 0)
  write(b)
end
return answer('kept', b, 0, 0)
