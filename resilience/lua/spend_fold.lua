-- Move all amounts of an account to its nearest open ancestor, once.  ARGV: ms to keep, account.
-- Returns 1, 0 when it was folded before, or nil if there is no such account.
local account = find(ARGV[2])
if not account then return false end
if account.name ~= ARGV[2] then return 0 end
local parent = find(account.of)
for _, part in ipairs({'free', 'held', 'spent'}) do add(parent, part, account[part], 1) end
put(parent)
call('HDEL', accounts, account.name)
local record = '{"of":' .. text(parent.name) .. ',"got":' .. exact(account.got) .. '}'
call('HSET', folded, account.name, record)
keep()
return 1
