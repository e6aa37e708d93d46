-- Begin.  KEYS: ..., where the value may be kept.  ARGV: id, lease ms, on whose behalf, then what each of those is called.
-- Returns {'landed', value, what has it} or {'mine' | 'again' | 'others', last landing, ''}.
for i = 3, #KEYS do
  local value = call('GET', KEYS[i])
  if value then return {'landed', value, ARGV[i + 1]} end
end
return {make_or_wait(ARGV[1], tonumber(ARGV[2]), ARGV[3], 0), call('HGET', landed, 'id') or '', ''}
