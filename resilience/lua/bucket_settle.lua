-- Replace the amounts of a grant by the amounts used, once.
-- ARGV: for each limit its capacity and the amount used ('': as taken).
-- The average share used counts about the last 12 calls; a call that used nothing is not in it.
-- Returns 1, or 0 when the grant was settled before or is too old.
local about = call('HGETALL', KEYS[1])
if #about == 0 then return 0 end
call('DEL', KEYS[1])
local taken = {}
for i = 1, #about, 2 do taken[about[i]] = tonumber(about[i + 1]) end
for i = 4, #KEYS do
  local n, real = i - 3, tonumber(ARGV[2 * (i - 3)])
  local v = call('HGET', KEYS[i], 'v')
  -- A limit that has expired is not created here: it would never expire.
  if v and real and real > 0 and (taken['a' .. n] or 0) > 0 then
    local ratio = tonumber(call('HGET', KEYS[i], 'ratio') or '1')
    local share = math.min(1, real / taken['a' .. n])
    call('HSET', KEYS[i], 'ratio', exact(ratio + (share - ratio) / 12))
  end
  if real and taken['a' .. n] and real ~= taken['a' .. n] then
    local back, cell = taken['a' .. n] - real, 'c' .. string.format('%.0f', taken['c' .. n])
    if v then
      call('HSET', KEYS[i], 'v', exact(math.min(tonumber(ARGV[2 * n - 1]), tonumber(v) + back)))
    end
    if call('HEXISTS', KEYS[i], cell) == 1 then
      call('HINCRBYFLOAT', KEYS[i], cell, exact(-back))
      call('HINCRBYFLOAT', KEYS[i], 'sum', exact(-back))
    end
  end
end
return 1
