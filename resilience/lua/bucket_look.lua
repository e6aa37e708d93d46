-- Read limits without changing them.  ARGV: for each limit: limit, window, capacity, guard.
-- Returns for each {level, amount taken in the last window, microseconds of hold}, as text.
local states = {}
for i = 4, #KEYS do
  local at = (i - 4) * 4
  local limit, window = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local b = read(KEYS[i], limit, window, tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4]))
  states[#states + 1] = {exact(b.v), exact(b.sum), exact(math.max(0, b.hold - now))}
end
return states
