-- Begin.  KEYS: ..., then each place that may hold the value (a memo, the cache).
-- ARGV: id, lease ms, owner, then the name of each place.
-- Returns {'landed', value, name of its place}, or {'mine' | 'again' | 'others', id of the last
-- landing, ''}.
for i = 3, #KEYS do
  local value = call('GET', KEYS[i])
  if value then return {'landed', value, ARGV[i + 1]} end
end
return {make_or_wait(ARGV[1], tonumber(ARGV[2]), ARGV[3], 0), call('HGET', landed, 'id') or '', ''}
