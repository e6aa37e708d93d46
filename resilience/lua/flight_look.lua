-- Look again.  ARGV: id, lease ms, landing seen.   Returns as flight_begin does.
local last = call('HGET', landed, 'id')
if last and last ~= ARGV[3] then return {'landed', call('HGET', landed, 'value'), 'flight'} end
return {make_or_wait(ARGV[1], tonumber(ARGV[2]), 1), ARGV[3], ''}
