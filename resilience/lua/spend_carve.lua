-- Move a share of the free amounts of an account into a new account, once.
-- ARGV: ms to keep, new account, share, account to carve from.
-- Returns the amounts of the new account at its start (JSON: unit -> amount), or nil if there is no
-- account to carve from.
local before = call('HGET', accounts, ARGV[2]) or call('HGET', folded, ARGV[2])
if before then return exact(cjson.decode(before).got) end
local parent = find(ARGV[4])
if not parent then return false end
local got = {}
for unit, free in pairs(parent.free) do got[unit] = math.max(0, free) * tonumber(ARGV[3]) end
add(parent, 'free', got, -1)
put(parent)
put({name = ARGV[2], of = parent.name, got = got, free = got, held = {}, spent = {}})
keep()
return exact(got)
