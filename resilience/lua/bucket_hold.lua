-- Grant nothing for a time, because the provider asked for it.  ARGV: microseconds.   Returns 1.
local till = now + tonumber(ARGV[1])
for i = 4, #KEYS do
  local key = KEYS[i]
  local hold = tonumber(call('HGET', key, 'hold') or '0')
  if till > hold then call('HSET', key, 'hold', exact(till)) end
  if call('PTTL', key) * 1000 < till - now then
    call('PEXPIRE', key, math.ceil((till - now) / 1000) + 60000)
  end
end
return 1
