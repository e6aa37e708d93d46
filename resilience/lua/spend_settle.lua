-- Replace the reserved amounts of a charge by the amounts used, once.
-- ARGV: ms to keep, id of the charge, used (JSON: unit -> amount), label ('': none).
-- Returns 1, or 0 if there is no such charge.
local reserved = call('HGET', charges, ARGV[2])
if not reserved then return 0 end
local charge, used = cjson.decode(reserved), cjson.decode(ARGV[3])
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
