-- Read limits without changing them.  ARGV: for each limit: limit, window, capacity, guard.
-- Returns for each {level, taken in the last window, microseconds of hold}, as text.
local found = {}
for i = 3, #KEYS do
  local at = (i - 3) * 4
  local b = read(KEYS[i], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4]))
  found[#found + 1] = {exact(b.v), exact(b.sum), exact(math.max(0, b.hold - now))}
end
return found
