-- Replace a reservation by what was used, once.  ARGV: ms to keep, charge, used (JSON: unit -> amount), label ('': none).
-- Returns 1, or 0 when it is not known.
local found = call('HGET', charges, ARGV[2])
if not found then return 0 end
local charge, used = cjson.decode(found), cjson.decode(ARGV[3])
local account = find(charge.account)
call('HDEL', charges, ARGV[2])
move(account, charge.amounts, call('ZREM', leases, ARGV[2]) == 1 and 'held' or 'spent', 'free')
move(account, used, 'free', 'spent')
put(account)
if ARGV[4] ~= '' then
  local tally = {spent = cjson.decode(call('HGET', labels, ARGV[4]) or '{}')}
  add(tally, 'spent', used, 1)
  call('HSET', labels, ARGV[4], exact(tally.spent))
end
keep()
return 1
