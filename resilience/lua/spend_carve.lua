-- Move a share of what is free into a new account, once.  ARGV: ms to keep, account, share, of which account.
-- Returns what it got (JSON: unit -> amount), now or the first time; nothing when there is no account to carve it from.
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
