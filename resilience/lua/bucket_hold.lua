-- Grant nothing for a time, because the provider asked for it.  ARGV: microseconds.   Returns 1.
local till = now + tonumber(ARGV[1])
for i = 3, #KEYS do
  if till > tonumber(call('HGET', KEYS[i], 'hold') or '0') then call('HSET', KEYS[i], 'hold', exact(till)) end
  if call('PTTL', KEYS[i]) * 1000 < till - now then call('PEXPIRE', KEYS[i], math.ceil((till - now) / 1000) + 60000) end
end
return 1
