-- End the pause that the provider asked for.
-- Returns {microseconds that were left of it, waiter ...}; the line is empty then.
local rest = 0
for i = 4, #KEYS do
  rest = math.max(rest, tonumber(call('HGET', KEYS[i], 'hold') or '0') - now)
  call('HDEL', KEYS[i], 'hold')
end
local waiters = call('ZRANGE', KEYS[3], 0, -1)
call('DEL', KEYS[3])
return {math.max(0, rest), unpack(waiters)}
