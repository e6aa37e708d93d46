-- Give permits back: one, or all of an owner.
-- ARGV: permit ('': all of the owner), owner, ok | dropped, lease ms, kind of limit, limit, largest
-- limit.   Returns {number of permits that were held, limit as text, waiters to wake ...}.
-- An adaptive limit grows by 1 for each round of calls while half of it is used.  It falls by a
-- tenth for a round with drops (additive increase, multiplicative decrease: Chiu and Jain, 1989).
local chosen = {ARGV[1]}
if ARGV[1] == '' then
  chosen = {}
  for _, permit in ipairs(call('ZRANGE', permits, 0, -1)) do
    if string.sub(permit, 1, #ARGV[2] + 1) == ARGV[2] .. '|' then chosen[#chosen + 1] = permit end
  end
end
if ARGV[5] == 'elastic' and used > tonumber(ARGV[6]) then call('HSET', about, 'above', now) end
local held, limit = 0, tonumber(call('HGET', about, 'limit') or ARGV[6])
for _, permit in ipairs(chosen) do
  local till = tonumber(call('ZSCORE', permits, permit) or '0')
  if call('ZREM', permits, permit) == 1 then
    held = held + 1
    local weight, began = give_back(permit), till - tonumber(ARGV[4])
    if ARGV[5] == 'aimd' and ARGV[1] ~= '' then
      if ARGV[3] == 'dropped' then
        if began > tonumber(call('HGET', about, 'cut') or '0') then
          limit = math.max(1, limit * 0.9)
          call('HSET', about, 'cut', now)
        end
      elseif 2 * used >= limit then
        limit = math.min(tonumber(ARGV[7]), limit + weight / limit)
      end
      call('HSET', about, 'limit', string.format('%.6f', limit))
    end
  end
end
if held == 0 then return {0, tostring(limit)} end
return {held, tostring(limit), woken(held)}
