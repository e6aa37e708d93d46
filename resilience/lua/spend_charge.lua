-- Reserve all amounts, or none.
-- ARGV: ms to keep, id, account, amounts (JSON: unit -> amount), ms of its lease, 1 when the holder
-- of the charge with this id is gone.
-- Returns {id, {reason, unit}, ...}: granted without a reason; nil if there is no such account.
local id, times = ARGV[2], 1
while call('HEXISTS', charges, id) == 1 do
  if call('ZSCORE', leases, id) then
    if ARGV[6] ~= '1' then return {id} end
    lapse(id)
  end
  -- A charge of this id has lapsed, and may still be settled, so the new one gets another id.
  times = times + 1
  id = ARGV[2] .. '~' .. times
end
local account, amounts, answer = find(ARGV[3]), cjson.decode(ARGV[4]), {id}
if not account then return false end
for unit, amount in pairs(amounts) do
  local free, least = account.free[unit], amount * (1 - CLOSE)
  if free and amount > 0 and least > free then
    answer[#answer + 1] = {least > free + (account.held[unit] or 0) and 'exhausted' or 'wait', unit}
  end
end
if #answer > 1 then return answer end
move(account, amounts, 'free', 'held')
put(account)
local charge = '{"account":' .. text(account.name) .. ',"amounts":' .. exact(amounts) .. '}'
call('HSET', charges, id, charge)
call('ZADD', leases, now + tonumber(ARGV[5]), id)
keep()
return answer
